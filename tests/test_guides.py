"Commands on pages: each parses, and the targets, parameters, sweeps, notebooks and tools that it names are there."
import ast
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest

from dt_pretrain.backbones import _REVISIONS
from dt_pretrain.cli import _parser, _values
from dt_pretrain.setups import FinetuneConfig, make_config
from dt_pretrain.sweeps import read_sweep, sweep_file
from dt_pretrain.tasks import InputError

TOP = Path(__file__).resolve().parents[1]
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted(p for p in (TOP / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)]
MAKEFILE = (TOP / "Makefile").read_text()


def prose(path):
    if path.suffix == ".md":
        return path.read_text()
    return "\n\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")


def blocks(text):
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)


def simple_commands(line):
    "The commands of a line of shell, as lists of words; also those inside of quotes."
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()")
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;()"):
            if words:
                yield words
            words = []
        else:
            words.append(word)
            if " " in word and "dt-pretrain" in word:
                yield from simple_commands(word)


def shell_commands(text):
    return [words for block in blocks(text) for line in block.replace("\\\n", " ").splitlines() for words in simple_commands(line)]


def inline_commands(text):
    "Code in running text that calls one of our tools with arguments."
    found = re.findall(r"(?<!`)`((?:\.venv/bin/)?(?:dt-pretrain|papermill|make) [^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    return [words for code in found for words in simple_commands(code)]


def check(words, whole=True):
    "Raise unless a command would be understood; `whole=False`: it may lack arguments."
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    for i, word in enumerate(words):
        if word.startswith(".venv/bin/"):
            assert Path(sys.executable).with_name(Path(word).name).exists(), f"no {word}"
        tool, rest = Path(word).name, words[i + 1:]
        if tool == "dt-pretrain" or words[i - 1:i + 1] == ["-m", "dt_pretrain.cli"]:
            return check_ours(rest) if whole else check_options(rest)
        if tool == "papermill":
            return check_papermill(rest)
        if tool == "make" and i == 0:
            return check_make(rest)
        if tool == "nbdev_test" or rest[:1] == ["pytest"]:
            assert all((TOP / w).exists() for w in rest if w.endswith((".ipynb", ".py"))), words
        if extras := re.fullmatch(r"\.\[([\w,]+)\]", word):
            settings = ConfigParser(delimiters=["="])
            settings.read(TOP / "settings.ini")
            assert all(f"{e}_requirements" in settings["DEFAULT"] for e in extras[1].split(",")), word


def check_ours(words):
    args = _parser().parse_args(words)
    if args.command == "finetune":
        make_config(**{"preset": args.preset, "task": args.task, **_values(args.set)})
    if args.command in ("sweep", "status") and "." not in args.file:
        assert sweep_file(TOP / "nbs/experiments/sweeps" / f"{args.file}.toml").is_file(), args.file
        assert read_sweep(TOP / "nbs/experiments/sweeps" / f"{args.file}.toml", args.preset, args.seeds)


def check_options(words):
    commands = next(a.choices for a in _parser()._actions if a.dest == "command")
    assert words[0] in commands, words
    known = commands[words[0]]._option_string_actions
    assert [w for w in words if w.startswith("-") and w not in known] == []


def check_papermill(words):
    from papermill.cli import _resolve_type, papermill
    given = papermill.make_context("papermill", list(words)).params
    path = TOP / given["notebook_path"]
    assert path.is_file(), path
    cell = next(c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", []))
    known = {t.id for s in ast.parse(cell.source).body if isinstance(s, ast.Assign) for t in s.targets}
    parameters = {name: _resolve_type(value) for name, value in given["parameters"]}
    if path.stem == "finetune":
        known |= {f.name for f in fields(FinetuneConfig)}
        make_config(**{k: v for k, v in parameters.items() if k not in ("runs_dir", "device")})
    assert parameters.keys() <= known, parameters.keys() - known


def check_make(words):
    variables = [w.split("=")[0] for w in words if "=" in w]
    assert all(f"$({v})" in MAKEFILE for v in variables), variables
    done = subprocess.run(["make", "-n", *words], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [p for p in PAGES if shell_commands(prose(p)) or inline_commands(prose(p))], ids=lambda p: str(p.relative_to(TOP)))
def test_commands_on_pages_are_understood(path):
    for words in shell_commands(prose(path)):
        check(words)
    for words in inline_commands(prose(path)):
        check(words, whole=False)


def test_guides_show_commands_and_are_found():
    shown = {p.stem: len(shell_commands(prose(p))) for p in (TOP / "nbs/guides").glob("*.ipynb")}
    assert len(shown) >= 6 and all(shown.values()), shown


def test_the_revision_in_the_guide_is_the_one_that_runs_use():
    assert _REVISIONS["gpt2"] in prose(TOP / "nbs/guides/gpu.ipynb")


@pytest.mark.parametrize("line", [
    "dt-pretrain finetun --preset mini", "dt-pretrain finetune --prset mini", "FOO=1 .venv/bin/dt-pretrain finetune --set contxt_length=1", "dt-pretrain sweep nowhere", "make reprot",
    "make report SEED=1", "papermill nbs/experiments/nowhere.ipynb out.ipynb", "papermill nbs/experiments/finetune.ipynb out.ipynb -p sead 1", "papermill nbs/experiments/finetune.ipynb out.ipynb -p seed one",
    "papermill nbs/experiments/collect.ipynb out.ipynb -p seed 1", "cd x && make nothing", "sbatch --wrap 'exec dt-pretrain sweep nowhere'", "python -m dt_pretrain.cli finetune --presets mini",
    ".venv/bin/nbdev_exprot", ".venv/bin/nbdev_test --path nbs/components/nothing.ipynb", "pip install -e '.[gpu]'"])
def test_wrong_commands_are_noticed(line):
    with pytest.raises((AssertionError, SystemExit, InputError)):
        for words in simple_commands(line):
            check(words)

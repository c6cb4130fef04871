"The notebooks are the source: they run, they are clean, and the package is what they export."
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from soak import processes

TOP = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (TOP / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
COMPONENTS = [p for p in NOTEBOOKS if p.parent.name == "components"]
name = lambda p: str(p.relative_to(TOP / "nbs"))  # noqa: E731


def code_cells(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def words(outputs):
    "What outputs say, without numbers, whose last digits differ from machine to machine, hashes, addresses, pictures and warnings."
    def said(output):
        data = output.get("data", {"text/plain": output.get("text", "")})
        kind = next((k for k in ("text/markdown", "text/html", "text/plain") if k in data), None)   # a wide table is shortened in plain text
        text = "".join(data.get(kind, ""))
        return re.sub(r"<style.*?</style>|<[^>]*>", " ", text, flags=re.S) if kind == "text/html" else text

    kept = [o for o in outputs if o["output_type"] in ("display_data", "execute_result") or o.get("name") == "stdout"]
    text = re.sub(r"\b(0x)?(?=[a-f]*\d)[0-9a-f]{6,}|\d+([.,]\d+)*\.?(e[-+]?\d+)?", "", " ".join(map(said, kept)))
    return re.sub(r"[\s+-]+", " ", text).strip()


def run_notebook(path, said, tmp):
    "What `nbdev_test` does with a notebook, which must also put out what is stored in it; what it makes with `tempfile` lies in `tmp`."
    os.environ["TMPDIR"], tempfile.tempdir = tmp, None
    from nbdev import test
    from nbdev.config import get_config
    stale = []

    class Shell(test.CaptureShell):
        def cell(self, cell, **kwargs):
            stored, cell["outputs"] = cell.get("outputs", []), []
            super().cell(cell, **kwargs)
            if words(stored) != words(cell["outputs"]) and "varies" not in cell.metadata.get("tags", []):
                stale.append(f"cell {cell.id} has stored:\n{words(stored)[:1500]}\nand says:\n{words(cell['outputs'])[:1500]}")

    test.CaptureShell = Shell
    os.chdir(TOP)
    sys.stderr = said.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    passed, _ = test.test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=TOP)
    sys.stderr.write("\n\n".join(stale))
    os._exit(0 if passed and not stale else 1)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name in ("components", "guides")], ids=name)
def test_notebook_runs(path, tmp_path):
    "Every cell of a component or guide runs, its examples and its tests, and says what is stored (but for numbers; a cell with the tag `varies` may say something else)."
    with tempfile.TemporaryDirectory(prefix="nb-", ignore_cleanup_errors=True) as tmp:   # not in tmp_path: names of sockets in it must be short
        process = processes.Process(target=run_notebook, args=(path, tmp_path / "said", tmp))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
            process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()[-4000:]


def test_what_a_notebook_leaves_behind_is_removed(tmp_path):
    code = f"import pathlib, tempfile; pathlib.Path({str(tmp_path)!r}, 'where').write_text(tempfile.mkdtemp())"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / "page.ipynb")
    test_notebook_runs(tmp_path / "page.ipynb", tmp_path)
    assert Path((tmp_path / "where").read_text()).name and not Path((tmp_path / "where").read_text()).exists()


def notebook_with(tmp_path, code, stored, tags=()):
    output = nbformat.v4.new_output("stream", name="stdout", text=stored)
    cell = nbformat.v4.new_code_cell(code, outputs=[output], metadata={"tags": list(tags)})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "page.ipynb")
    return tmp_path / "page.ipynb"


@pytest.mark.parametrize(("code", "stored"), [("print('two runs, 0.52')", "one run, 0.52"), ("1;", "it said something"), ("print('new')", "")])
def test_stale_outputs_are_told(tmp_path, code, stored):
    with pytest.raises(AssertionError, match="has stored:"):
        test_notebook_runs(notebook_with(tmp_path, code, stored), tmp_path)
    test_notebook_runs(notebook_with(tmp_path, code, stored, ["varies"]), tmp_path)


def test_numbers_may_differ(tmp_path):
    test_notebook_runs(notebook_with(tmp_path, "print('error -0.52, 3e-05, run K1-s0-3df0fe12, at 0x7f3a9c')", "error 0.5, 31, run K1-s0-a4712841, at 0x7faaaa"), tmp_path)


def test_a_styled_table_says_what_is_in_its_cells():
    tables = [pd.DataFrame({"weights": ["random"], "error": [e]}).style.set_properties(color="red")._repr_html_() for e in (0.5, 1)]   # with random names in its style
    (said,) = {words([nbformat.v4.new_output("display_data", {"text/html": t})]) for t in tables}
    assert said.endswith("weights error random")


@pytest.mark.parametrize(("stored", "now"), [("smollm2-permuted is ahead", "smollm2-random is ahead"), ("a,0.52,supported", "a,0.52,inconclusive"),
                                             ("p<0.05, supported, q>0.1", "p<0.05, not supported, q>0.1"), ("faced a facade", "faced a decade")])
def test_words_beside_numbers_are_seen(stored, now):
    assert words([nbformat.v4.new_output("stream", name="stdout", text=stored)]) != words([nbformat.v4.new_output("stream", name="stdout", text=now)])
    assert words([nbformat.v4.new_output("stream", name="stdout", text=stored)]) == words([nbformat.v4.new_output("execute_result", {"text/plain": stored})])


def files(folder, pattern):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob(pattern)) if "__pycache__" not in p.parts}


def test_package_is_what_the_notebooks_export(checkout):
    before = files(checkout / "dt_pretrain", "*.py")
    for module in before:
        if module not in ("__init__.py", "_modidx.py"):
            (checkout / "dt_pretrain" / module).write_text("")
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], check=True, cwd=checkout, capture_output=True)
    assert files(checkout / "dt_pretrain", "*.py") == before


def test_notebooks_are_clean(checkout):
    before = files(checkout / "nbs", "*.ipynb")
    subprocess.run([Path(sys.executable).with_name("nbdev_clean")], check=True, cwd=checkout, capture_output=True)
    assert [k for k, v in files(checkout / "nbs", "*.ipynb").items() if v != before[k]] == []


def test_exported_cells_are_small():
    lines = {}
    for path in COMPONENTS:
        for i, cell in enumerate(code_cells(path)):
            if re.search(r"^#\| ?export\b", cell.source, re.M):
                lines[name(path), i] = sum(bool(x.strip()) and not x.startswith("#|") for x in cell.source.splitlines())
    assert max(lines.values()) <= 40, max(lines, key=lines.get)
    assert statistics.median(lines.values()) < 12


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name in ("experiments", "findings")], ids=name)
def test_parameters_come_first_and_are_tagged(path):
    assert "parameters" in code_cells(path)[0].metadata.get("tags", [])


def test_no_path_of_a_machine_in_outputs():
    found = [(name(p), m[0]) for p in NOTEBOOKS for m in re.finditer(r"/(home|root|work|Users|builds?|tmp)/[\w.-]+", json.dumps([c.get("outputs", []) for c in code_cells(p)]))]
    assert found == []


def test_cells_have_ids_of_their_own():
    ids = {name(p): [c["id"] for c in json.loads(p.read_text())["cells"]] for p in NOTEBOOKS}
    assert [n for n, found in ids.items() if len(found) != len(set(found))] == []


def test_no_saved_error():
    assert [name(p) for p in NOTEBOOKS for c in code_cells(p) for o in c.get("outputs", []) if o.output_type == "error"] == []


def unfilled(text):
    "Fields of a format string that nobody filled in, and numbers that are none."
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    return re.findall(r"(?<![\w\\^${])\{[a-z_]\w*(?:[.\[(][^{}\n]*)?(?::[^{}\n]*)?\}|(?<![\w.])nan(?![\w.])", text)


def test_what_is_unfilled_is_seen():
    assert unfilled("0.20. {how_far} Then {n:,} and {d.seed[0]:.2f} of nan%") == ["{how_far}", "{n:,}", "{d.seed[0]:.2f}", "nan"]
    assert unfilled(r"$\hat{R}_{t}^{x}$ ::: {.verdict} <style>a {color: red}</style> {'a': 1} nanoseconds torch.nan") == []


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name not in ("components", "guides")], ids=name)
def test_every_number_of_a_sentence_is_filled_in(path):
    outputs = [o.data for c in code_cells(path) for o in c.get("outputs", []) if "data" in o]
    assert [found for data in outputs for kind in ("text/markdown", "text/html") for found in unfilled(data.get(kind, ""))] == []


def test_every_notebook_is_in_the_sidebar_once():
    def leaves(items):
        for item in items:
            yield from leaves(item["contents"]) if isinstance(item, dict) else [item]
    listed = list(leaves(yaml.safe_load((TOP / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]))
    assert sorted(listed) == sorted(map(name, NOTEBOOKS))


def test_readme_is_made_from_index():
    from dt_pretrain.site import readme_from
    assert (TOP / "README.md").read_text() == readme_from(TOP / "nbs" / "index.ipynb")


def test_help_does_not_wait_for_torch():
    code = "import sys; from dt_pretrain.cli import _parser; _parser().format_help(); print(*sorted({'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_core_modules_need_no_notebook_tooling_and_no_simulator():
    "On a GPU machine the package runs straight from the checkout."
    code = "import sys, dt_pretrain.finetuning, dt_pretrain.runs; print(*sorted({'IPython', 'nbdev', 'papermill', 'jupyter_client', 'nbformat', 'gymnasium', 'mujoco', 'minari', 'd4rl', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP, env={**os.environ, "PYTHONPATH": str(TOP)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def shown(path):
    "What a page's cells put out, without pictures."
    return {c.id: [{k: v for k, v in o.get("data", {}).items() if k != "image/png"} or o.get("text") for o in c.outputs] for c in code_cells(path)}


@pytest.mark.parametrize("page", ["findings/5_no_context", "findings/7_context"])
def test_pages_show_what_is_kept(checkout, monkeypatch, page):
    "A page that is made again from results/ says what the saved page says (else: `dt-pretrain refresh`)."
    from dt_pretrain.report import refresh

    monkeypatch.chdir(checkout)
    saved = TOP / f"nbs/{page}.ipynb"
    refresh([page], say=lambda *_: None)
    assert shown(checkout / f"nbs/{page}.ipynb") == shown(saved) and "supported" in json.dumps(shown(saved))

"Files and parameters are data: nothing in them is executed, and nothing is written or read outside of where it belongs."
import ast
import io
import json
import os
import pickle
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from soak import VALUES

from dt_pretrain import tasks
from dt_pretrain.backbones import load_backbone
from dt_pretrain.collection import Policy, collected, load_trajectories
from dt_pretrain.execution import execute_notebook
from dt_pretrain.finetuning import finetune, load_model
from dt_pretrain.runs import Run, load_tensors, load_weights, run_folder
from dt_pretrain.setups import make_config
from dt_pretrain.sweeps import read_sweep, unpack
from dt_pretrain.tasks import InputError, Task, get_task, register_task
from dt_pretrain.trajectories import take_episodes, write_minari

TOP = Path(__file__).resolve().parents[1]


class Trap:
    "Unpickled, it writes a file."
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def trap(tmp_path):
    "A pickle that would leave a mark, and the mark."
    mark = tmp_path / "executed"
    return pickle.dumps(Trap(mark)), mark


# nothing is executed

FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.loads"}
MODULES = {"pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
OPTIONS = {("shell", "True"), ("trust_remote_code", "True"), ("allow_pickle", "True"), ("weights_only", "False")}


def sources():
    "All code of the package, and of the notebooks that are not exported."
    for path in sorted((TOP / "dt_pretrain").rglob("*.py")):
        yield path, path.read_text()
    for path in sorted(p for folder in ("experiments", "findings", "guides") for p in (TOP / "nbs" / folder).glob("*.ipynb")):
        yield path, "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")


def executing(source):
    "Code that would execute data, whatever it is called here: its lines and texts."
    tree, names = ast.parse(source), {}
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import) or isinstance(n, ast.ImportFrom) and not n.level]
    for node in imports:
        for a in node.names:
            whole = a.name if isinstance(node, ast.Import) else f"{node.module}.{a.name}"
            if a.asname or isinstance(node, ast.ImportFrom):
                names[a.asname or a.name] = whole.removeprefix("builtins.")
            if whole.split(".")[0] in MODULES or whole in FORBIDDEN:
                yield node.lineno, ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            if (names.get(first, first) + dot + rest).removeprefix("builtins.") in FORBIDDEN:
                yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Call) and OPTIONS & {(k.arg, ast.unparse(k.value)) for k in node.keywords}:
            yield node.lineno, ast.unparse(node)[:80]


def test_no_code_that_executes_data():
    assert [(path.name, *found) for path, source in sources() for found in executing(source)] == []


@pytest.mark.parametrize("source", [
    "import pickle", "import os, pickle as p", "from pickle import loads", "from joblib import load as read", "import dill.session", "import torch as T; T.load(x)", "from torch import load", "from torch import load as read; read(x)",
    "import torch; read = torch.load", "import pandas as pd; pd.read_pickle(x)", "import numpy as np; np.load(x, allow_pickle=True)", "from os import system", "import os as o; o.system(x)", "import builtins; builtins.eval(x)",
    "from builtins import exec as run; run(x)", "exec(x)", "def f():\n    import yaml as y\n    return y.load(x)", "run(x, shell=True)", "torch.load(x)"])
def test_code_that_executes_data_is_seen(source):
    assert list(executing(source))


def test_code_that_reads_data_is_not_taken_for_it():
    assert list(executing("import torch, re, json as j, yaml\nfrom safetensors.torch import load_file\nfrom .runs import load\nmodel.eval(); re.compile(x); j.load(f); load(x); yaml.safe_load(x); self.exec; np.load(x)")) == []


def test_pickle_named_safetensors(trap, tmp_path):
    code, mark = trap
    path = tmp_path / "epoch_000.safetensors"
    path.write_bytes(code)
    for read in (load_tensors, lambda p: load_weights(torch.nn.Linear(1, 1), p), lambda p: Policy(p, get_task("hopper-medium"))):
        with pytest.raises(InputError, match="epoch_000.safetensors: expected a complete safetensors file"):
            read(path)
    assert not mark.exists()


def test_pickle_in_the_place_of_a_checkpoint_and_a_training_state(trap, tmp_path):
    code, mark = trap
    run = finetune(make_config("smoke", **VALUES | dict(epochs=1)), tmp_path / "runs", device="cpu", progress=False)
    run.checkpoint_path(1).write_bytes(code)
    with pytest.raises(InputError, match="a complete safetensors file"):
        load_model(run, 1)
    run.note(status="running", last_epoch=0)
    run.resume_path(0).write_bytes(code)
    with pytest.warns(UserWarning, match="resume/epoch_000.safetensors"):
        finetune(run.config, tmp_path / "runs", device="cpu", progress=False)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pickle_in_a_folder_with_a_backbone(trap, tmp_path, name):
    code, mark = trap
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(dict(model_type="gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=4)))
    (tmp_path / "model" / name).write_bytes(code)
    with pytest.raises(InputError, match="expected weights in complete safetensors files"):
        load_backbone(str(tmp_path / "model"))
    assert not mark.exists()


def test_code_that_comes_with_a_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(dict(model_type="mine", auto_map=dict(AutoConfig="code.Config", AutoModel="code.Model"))))
    (tmp_path / "model/code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(InputError):
        load_backbone(str(tmp_path / "model"))
    assert not (tmp_path / "executed").exists()


def test_parameters_of_notebooks_are_data(top, tmp_path):
    "Papermill would write a name into the notebook as it is."
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')"
    for parameters in ({f"seed = 1; {code}; x": 1}, {"seed\n" + code: 1}, {"__builtins__": {}}):
        with pytest.raises(InputError, match="name of a parameter: expected a name of Python"):
            execute_notebook(top / "nbs/experiments/finetune.ipynb", tmp_path / "out.ipynb", parameters)
    with pytest.raises(RuntimeError, match="setup: expected one of"):
        execute_notebook(top / "nbs/experiments/finetune.ipynb", tmp_path / "out.ipynb", dict(runs_dir=str(tmp_path), setup=f'x"\n{code}\n"'))
    assert not mark.exists()


def test_values_of_the_command_line_are_data(cli, tmp_path):
    mark = tmp_path / "executed"
    code, said = cli("finetune", "--preset", "smoke", "--runs-dir", tmp_path, "--set", f"setup=__import__('os').system('touch {mark}')")
    assert code == 2 and "setup: expected one of" in said and not mark.exists()


# nothing is written elsewhere

@pytest.fixture
def restore_tasks(monkeypatch):
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))


OUTSIDE = ["../outside", "/outside", "..", "a/b", "a\\b", ".hidden", "", "a\nb", "a\0b", "~"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_path_in_the_name_of_a_task(name, tmp_path, monkeypatch, restore_tasks):
    with pytest.raises(InputError, match="task: expected one of"):
        make_config("smoke", task=name)
    with pytest.raises(InputError, match="task name: expected letters, digits"):
        register_task(Task(name, "Hopper-v4", 11, 3, (1.0,), 0.0, 1.0, 0, 0, (0.0, 1.0)))
    tasks._TASKS[name] = Task(name, "Hopper-v4", 11, 3, (1.0,), 0.0, 1.0, 0, 0, (0.0, 1.0))   # past the door
    with pytest.raises(InputError, match="name of a folder: expected letters, digits"):
        run_folder(make_config("smoke", task=name), tmp_path)


def test_name_of_an_initialisation_with_a_line_break():
    with pytest.raises(InputError, match="initialisation: expected a name or a path"):
        make_config("smoke", initialisation="x\n../y")


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", ".", "gpt2/../../../outside"])
def test_path_in_the_name_of_an_initialisation(name, tmp_path):
    path = run_folder(make_config("smoke", initialisation=name), tmp_path)
    assert path.parent == tmp_path / "hopper-medium" and re.fullmatch(r"[\w.-]{1,150}", path.name)


@pytest.mark.parametrize("part", ["task", "run", "resume", "damaged"])
def test_link_out_of_the_folder(part, tmp_path):
    config, outside = make_config("smoke", **VALUES), tmp_path / "outside"
    outside.mkdir()
    run = Run(run_folder(config, tmp_path / "runs"))
    link = dict(task=run.path.parent, run=run.path, resume=run.path / "resume", damaged=run.path / "damaged")[part]
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(InputError, match="expected a folder inside the runs folder, found a link to"):
        finetune(config, tmp_path / "runs", device="cpu", progress=False)
    assert list(outside.iterdir()) == []


def test_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    config, outside = make_config("smoke", **VALUES | dict(epochs=1)), tmp_path / "precious"
    outside.write_text("precious")
    path = run_folder(config, tmp_path / "runs")
    path.mkdir(parents=True)
    for name in ("epoch_000.safetensors", "epoch_001.safetensors", "metrics.parquet"):
        (path / name).symlink_to(outside)
    run = finetune(config, tmp_path / "runs", device="cpu", progress=False)
    assert outside.read_text() == "precious" and not any(p.is_symlink() for p in run.path.rglob("*"))


def test_what_comes_back_from_a_worker_stays_in_its_folder(tmp_path):
    for name, kind, link in (("../x", tarfile.REGTYPE, ""), ("/tmp/x", tarfile.REGTYPE, ""), ("a/../../x", tarfile.REGTYPE, ""), ("x", tarfile.SYMTYPE, "/etc"), ("x", tarfile.LNKTYPE, "/etc/passwd"), ("x", tarfile.FIFOTYPE, "")):
        with io.BytesIO() as out:
            with tarfile.open(fileobj=out, mode="w") as tar:
                good, bad = tarfile.TarInfo("good"), tarfile.TarInfo(name)
                bad.type, bad.linkname = kind, link
                tar.addfile(good)
                tar.addfile(bad)
            with pytest.raises(InputError, match="packed run: expected plain files inside its folder"):
                unpack(out.getvalue(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_names_in_a_sweep(tmp_path):
    for text in ('task = "../x"', "initialisation = [1]", 'setup = "../x"', "path = [[1]]"):
        (tmp_path / "s.toml").write_text(f"[[runs]]\n{text}\nseeds = {{smoke = 1}}")
        with pytest.raises(InputError, match="s.toml"):
            read_sweep(tmp_path / "s.toml", "smoke")


# nothing is read elsewhere

def d4rl_file(path, n=30):
    with h5py.File(path, "w") as f:
        for key, shape in dict(observations=(n, 11), actions=(n, 3), rewards=(n,)).items():
            f[key] = np.zeros(shape, np.float32)
        f["terminals"], f["timeouts"] = np.arange(n) == n - 1, np.zeros(n, bool)
    return path


def external(f, key, other):
    del f[key]
    f[key] = h5py.ExternalLink(str(other), "/secret")


def external_behind_a_soft_link(f, key, other):
    f.move(key, "elsewhere")
    del f["elsewhere"]
    f["elsewhere"] = h5py.ExternalLink(str(other), "/secret")
    f[key] = h5py.SoftLink("/elsewhere")


def raw(f, key, other):
    del f[key]
    f.create_dataset(key, (30,), dtype="f4", external=[(str(other), 0, 120)])


def virtual(f, key, other):
    del f[key]
    layout = h5py.VirtualLayout((30,), "f4")
    layout[:] = h5py.VirtualSource(str(other), "secret", (30,))
    f.create_virtual_dataset(key, layout)


@pytest.mark.parametrize("how", [external, external_behind_a_soft_link, raw, virtual])
def test_hdf5_that_leads_to_another_file(how, tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as f:
        f["secret"] = np.zeros(30, np.float32)
    path = d4rl_file(tmp_path / "d4rl.hdf5")
    assert load_trajectories("hopper-medium", "d4rl", path).n_steps == 30
    with h5py.File(path, "a") as f:
        how(f, "rewards", tmp_path / "other.hdf5")
    with pytest.raises(InputError, match="d4rl.hdf5: expected a file that holds its data itself, found"):
        load_trajectories("hopper-medium", "d4rl", path)


def test_minari_dataset_that_leads_to_another_file(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as f:
        f["secret"] = np.zeros(1000, np.float32)
    data = load_trajectories("hopper-medium", n_steps=3000, progress=False)
    path = write_minari(take_episodes(data, np.arange(2)), tmp_path / "data")
    with h5py.File(path / "data/main_data.hdf5", "a") as f:
        external(f["episode_0"], "rewards", tmp_path / "other.hdf5")
    with pytest.raises(InputError, match="main_data.hdf5: expected a file that holds its data itself, found episode_0/rewards"):
        load_trajectories("hopper-medium", "minari", path)


def test_the_cache_is_no_way_out_either(tmp_path, monkeypatch, restore_tasks):
    monkeypatch.setenv("DT_PRETRAIN_CACHE", str(tmp_path / "cache"))
    name = "../../outside"
    task = tasks._TASKS[name] = replace(get_task("hopper-medium"), name=name)   # past the door
    for way in (name, task):
        with pytest.raises(InputError, match="name of a folder: expected letters, digits"):
            collected(way, 100, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_header_cannot_claim_more_than_there_is(tmp_path):
    save_file(dict(a=torch.zeros(4)), tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    for size in (2**63, 2**40, len(content) * 2):
        (tmp_path / "b.safetensors").write_bytes(size.to_bytes(8, "little") + content[8:])
        with pytest.raises(InputError, match="a complete safetensors file"):
            load_tensors(tmp_path / "b.safetensors")

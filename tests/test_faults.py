"What must not happen to a user's files, and what the command line says to bad input."
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from soak import VALUES, contents, processes, run_of

from dt_pretrain import runs
from dt_pretrain.backbones import load_backbone
from dt_pretrain.collection import Policy, collected, load_trajectories
from dt_pretrain.execution import execute_notebook
from dt_pretrain.findings import read_results
from dt_pretrain.finetuning import Trainer, finetune, load_model
from dt_pretrain.runs import ADDED, Run, find_runs, load_tensors, read_table, run_folder, save_tensors
from dt_pretrain.setups import FinetuneConfig, config_hash, make_config, run_name
from dt_pretrain.sweeps import read_sweep, unpack
from dt_pretrain.tasks import InputError, get_task


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finetune(make_config("smoke"), tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture
def run(finished, tmp_path):
    "A copy of a finished run."
    copy = type(finished)(tmp_path / finished.path.parent.name / finished.path.name)
    shutil.copytree(finished.path, copy.path)
    return copy


def test_checkpoint_of_another_architecture(run):
    save_tensors(run.checkpoint_path(2), dict(w=torch.zeros(3)))
    with pytest.raises(InputError, match=r"epoch_002.safetensors: expected the tensors of this model, found \d+ that differ"):
        load_model(run, 2)


def test_truncated_checkpoint(run):
    path = run.checkpoint_path(1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="epoch_001.safetensors: expected a complete safetensors file"):
        load_model(run, 1)


def test_damaged_training_state_is_named_and_nothing_is_overwritten(run):
    run.note(status="running", last_epoch=1)
    before = {p: p.read_bytes() for p in run.path.glob("epoch_*")}
    with pytest.raises(InputError, match="resume/epoch_001.safetensors: expected a safetensors file, found none"):
        finetune(make_config("smoke"), run.path.parents[1], progress=False)
    assert {p: p.read_bytes() for p in run.path.glob("epoch_*")} == before


def test_training_state_of_another_model(run):
    run.note(status="running", last_epoch=1)
    save_tensors(run.resume_path(1), {"step": torch.tensor(4), "generator.sampler": torch.get_rng_state()})
    with pytest.raises(InputError, match=r"resume/epoch_001.safetensors: expected this model's training state, found \d+ tensors missing"):
        finetune(make_config("smoke"), run.path.parents[1], progress=False)


def test_gradient_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    from dt_pretrain.finetuning import Trainer
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (step(self)[0], torch.tensor(float("nan"))))
    with pytest.raises(FloatingPointError, match="gradient norm nan at step 1"):
        finetune(make_config("smoke", seed=7), tmp_path, progress=False)


def test_too_little_memory_is_noted(tmp_path, monkeypatch):
    from dt_pretrain.finetuning import Trainer

    def too_large(self):
        return torch.empty(2**60)
    monkeypatch.setattr(Trainer, "train_step", too_large)
    with pytest.raises(RuntimeError, match="memory"):
        finetune(make_config("smoke", seed=7), tmp_path, progress=False)
    (run,) = find_runs(tmp_path, finished=False)
    assert run.status == "failed" and "memory" in run.manifest["error"]


def test_after_a_loss_that_is_not_a_number_the_last_epoch_is_whole(tmp_path, monkeypatch, left_alone):
    step = Trainer.train_step
    with monkeypatch.context() as m, pytest.raises(FloatingPointError, match="loss nan .* at step 31"):
        m.setattr(Trainer, "train_step", lambda self: tuple(x * (float("nan") if self.step == 31 else 1) for x in step(self)))
        finetune(make_config("smoke", **VALUES), tmp_path, device="cpu", progress=False)
    run = run_of(tmp_path)
    assert (run.status, run.last_epoch) == ("failed", 2) and "step 31" in run.manifest["error"]
    goes_on(run, left_alone)


# a full disk

def goes_on(run, left_alone):
    "Start it again: it ends like the one that nobody disturbed."
    finetune(make_config("smoke", **VALUES), run.path.parents[1], device="cpu", progress=False)
    assert run.status == "finished" and contents(run) == contents(left_alone)


@pytest.mark.parametrize("file", ["epoch_002.safetensors", "resume/epoch_002.safetensors", "metrics.parquet", "resume/metrics.parquet", "manifest.json", "resume/manifest.json"])
def test_disk_full_at_every_file_of_an_epoch(tmp_path, monkeypatch, left_alone, file):
    run, replace_ = run_of(tmp_path), os.replace

    def full(source, target):
        if Path(target) == run.path / file and Run(run.path).last_epoch == (2 if file == "resume/manifest.json" else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_(source, target)
    with monkeypatch.context() as m, pytest.raises(OSError, match=f"{file} could not be written: .*No space left on device"):
        m.setattr(runs.os, "replace", full)
        finetune(make_config("smoke", **VALUES), tmp_path, device="cpu", progress=False)
    assert run.last_epoch in (1, 2) and not list(run.path.rglob(".*.[0-9]*"))
    goes_on(run, left_alone)


ON_SMALL_DISK = """
import sys, shutil, resource
from soak import VALUES
from dt_pretrain.cli import main
code = main(['finetune', '--preset', 'smoke', '--device', 'cpu', '--runs-dir', sys.argv[1], '--set', *(f'{k}={v}' for k, v in VALUES.items())])
shutil.copytree(sys.argv[1], sys.argv[2])
sys.exit(code)
"""


@pytest.mark.skipif(subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode != 0, reason="needs the right to mount a small file system")
def test_disk_really_full(tmp_path, top, left_alone):
    "A file system in memory with room for two epochs, in a name space of its own."
    size = sum(p.stat().st_size for p in left_alone.path.rglob("*") if p.is_file()) * 1.2
    (tmp_path / "small").mkdir()
    script = f"mount -t tmpfs -o size={int(size)} none {tmp_path}/small && exec {sys.executable} - {tmp_path}/small {tmp_path}/kept"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], input=ON_SMALL_DISK, capture_output=True, text=True, cwd=top / "tests")
    assert done.returncode == 1 and re.search(r"^dt-pretrain: .*could not be written: .*No space left on device", done.stderr, re.M), done.stderr
    assert "Traceback" not in done.stderr
    run = run_of(tmp_path / "kept")
    assert run.last_epoch is not None and run.status != "finished"
    goes_on(run, left_alone)


# a damaged file, found on resume

@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    "A run that was broken off in its fourth epoch."
    folder, evaluate, calls = tmp_path_factory.mktemp("broken"), Trainer.evaluate, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(self)
    Trainer.evaluate = interrupted
    try:
        finetune(make_config("smoke", **VALUES), folder, device="cpu", progress=False)
    except KeyboardInterrupt:
        pass
    finally:
        Trainer.evaluate = evaluate
    return run_of(folder)


DAMAGE = {
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "something else": lambda p: p.write_text("<html>404</html>"),
    "gone": lambda p: p.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["epoch_003.safetensors", "resume/epoch_003.safetensors", "metrics.parquet", "manifest.json"])
def test_damaged_file_is_set_aside_and_the_epoch_before_used(broken_off, left_alone, tmp_path, file, how):
    shutil.copytree(broken_off.path.parents[1], tmp_path, dirs_exist_ok=True)
    run = run_of(tmp_path)
    assert run.last_epoch == 3
    DAMAGE[how](run.path / file)
    if (file, how) == ("manifest.json", "gone"):
        return goes_on(run, left_alone)   # its second copy serves, and nothing is wrong
    with pytest.warns(UserWarning, match=rf"{file}: expected .*; the run goes on from what is whole"):
        goes_on(run, left_alone)
    aside = [p.name for p in (run.path / "damaged").iterdir()]
    assert aside == ([] if how == "gone" else [f"0-{Path(file).name}"])


def test_damage_to_both_epochs_is_an_error_and_nothing_is_touched(broken_off, tmp_path):
    shutil.copytree(broken_off.path.parents[1], tmp_path, dirs_exist_ok=True)
    run = run_of(tmp_path)
    for e in (2, 3):
        DAMAGE["cut off"](run.resume_path(e))
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="resume/epoch_003.safetensors: expected a complete safetensors file"):
        finetune(make_config("smoke", **VALUES), tmp_path, device="cpu", progress=False)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_damage_before_any_training_is_no_loss(left_alone, tmp_path, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Trainer, "train_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        finetune(make_config("smoke", **VALUES), tmp_path, device="cpu", progress=False)
    run = run_of(tmp_path)
    DAMAGE["zeros"](run.checkpoint_path(0))
    with pytest.warns(UserWarning, match="epoch_000.safetensors"):
        goes_on(run, left_alone)


def test_notebooks_and_other_things_in_the_folder_are_left_alone(left_alone, tmp_path):
    "Jupyter makes .ipynb_checkpoints beside a notebook that somebody opens."
    run = run_of(tmp_path)
    (run.path / ".ipynb_checkpoints").mkdir(parents=True)
    (run.path / ".ipynb_checkpoints/finetune-checkpoint.ipynb").write_text("{}")
    goes_on(run, left_alone)
    assert (run.path / ".ipynb_checkpoints/finetune-checkpoint.ipynb").exists()


# a folder that cannot be written to

def as_nobody(runs_dir, queue):
    "Try it without the rights of root, for whom no folder is read-only."
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        finetune(make_config("smoke", **VALUES), runs_dir, device="cpu", progress=False)
    except InputError as e:
        queue.put(str(e))


@pytest.mark.parametrize("begun", [False, True])
def test_read_only_folder(begun):
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(folder)
        if begun:
            run.path.mkdir(parents=True)
            (run.path / "resume").mkdir()
        for p in (Path(folder), *Path(folder).rglob("*")):
            p.chmod(0o555)
        queue = processes.Queue()
        process = processes.Process(target=as_nobody, args=(folder, queue))
        process.start()
        assert re.search(f"{run.path.name}: expected a folder to write to, found", queue.get(timeout=120))
        process.join()
        for p in (Path(folder), *Path(folder).rglob("*")):
            p.chmod(0o755)


# folders of other versions

FIRST_FIELDS = """task initialisation setup context_length seed source path n_steps held_out n_layer width n_head activation dropout attention_dropout head epochs steps_per_epoch batch_size
match_targets pad_raw_states learning_rate weight_decay decay adam_eps warmup_steps max_grad_norm precision eval_episodes eval_max_steps eval_windows target_returns keep_checkpoints""".split()
DEFAULTS = dict(scale="mini", revision=None, donor=None, block=None)


def test_values_that_were_added_are_listed_with_defaults_that_change_nothing():
    "Whoever adds a value to FinetuneConfig: name it in `runs.ADDED` and here, with a default under which older runs are what they were."
    assert {f.name for f in fields(FinetuneConfig)} == {*FIRST_FIELDS, *ADDED}
    assert {f.name: f.default for f in fields(FinetuneConfig) if f.name in ADDED} == DEFAULTS


def as_of_old(run):
    "What version 0.1.0 would have left: another name, and fewer values."
    values = {k: v for k, v in asdict(run.config).items() if k in FIRST_FIELDS}
    (run.path / "config.json").write_text(json.dumps(values, indent=1))
    old = run.path.with_name(run.path.name[:-8] + "0ld0ld00")
    run.path.rename(old)
    return Run(old)


def test_finished_folder_of_an_older_version_is_taken_over(left_alone, tmp_path):
    shutil.copytree(left_alone.path.parents[1], tmp_path, dirs_exist_ok=True)
    old = as_of_old(run_of(tmp_path))
    stamp = old.checkpoint_path(4).stat().st_mtime_ns
    run = finetune(make_config("smoke", **VALUES), tmp_path, progress=False)
    assert run.path == run_of(tmp_path).path and not old.path.exists()
    assert run.manifest["was"] == old.path.name and run.checkpoint_path(4).stat().st_mtime_ns == stamp
    assert contents(run) == contents(left_alone) and asdict(run.config).keys() == json.loads((run.path / "config.json").read_text()).keys()


def test_unfinished_folder_of_an_older_version_goes_on(broken_off, left_alone, tmp_path):
    shutil.copytree(broken_off.path.parents[1], tmp_path, dirs_exist_ok=True)
    old = as_of_old(run_of(tmp_path))
    for p in (old.path / "resume").glob("*.safetensors"):     # their training states had no rows
        from dt_pretrain.runs import load_tensors
        tensors, facts = load_tensors(p)
        save_tensors(p, {k: v for k, v in tensors.items() if k != "rows"}, **facts)
    goes_on(run_of(tmp_path), left_alone)


def test_folder_of_an_older_version_with_other_values_is_another_run(left_alone, tmp_path):
    shutil.copytree(left_alone.path.parents[1], tmp_path, dirs_exist_ok=True)
    old = as_of_old(run_of(tmp_path))
    values = json.loads((old.path / "config.json").read_text())
    for change in (dict(learning_rate=0.5), dict(task=7), {}):
        (old.path / "config.json").write_text(json.dumps(values | change) if change else "{")
        assert finetune(make_config("smoke", **VALUES | dict(epochs=1)), tmp_path, progress=False).manifest.get("was") is None
        assert old.path.exists()


def test_folder_that_lacks_what_was_always_there_is_refused(run):
    path = run.path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "seed"}))
    assert config_hash(make_config("smoke")) in run_name(make_config("smoke")) == run.path.name
    with pytest.raises(InputError, match="config.json: expected all values of a configuration, found none for seed"):
        finetune(make_config("smoke"), run.path.parents[1], progress=False)


def test_nan_in_a_file_is_named(tmp_path):
    import h5py
    n = {"observations": (9, 11), "actions": (9, 3), "rewards": (9,), "terminals": (9,), "timeouts": (9,)}
    with h5py.File(tmp_path / "nan.hdf5", "w") as f:
        for key, shape in n.items():
            f[key] = torch.zeros(shape).numpy() if key[0] in "oar" else torch.arange(9).eq(8).numpy()
        f["rewards"][4] = float("nan")
    with pytest.raises(InputError, match=r"nan.hdf5: rewards: expected finite numbers, found 1 NaN or infinite, the first at step 4"):
        load_trajectories("hopper-medium", "d4rl", tmp_path / "nan.hdf5")


def test_d4rl_gives_the_same_references():
    "The environment that make builds has d4rl, so this must not be skipped."
    from dt_pretrain.tasks import get_task, import_d4rl, normalized_score, task_names
    d4rl = import_d4rl()
    for name in task_names():
        assert normalized_score(name, 1234.5) == pytest.approx(100 * d4rl.get_normalized_score(get_task(name).d4rl_name, 1234.5), rel=1e-12)
        assert get_task(name).d4rl_name in d4rl.infos.DATASET_URLS


def test_configuration_from_a_newer_version(run):
    path = run.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(flux_capacitor=1)))
    with pytest.raises(InputError, match="'flux_capacitor': expected .*, found an unknown name"):
        run.__class__(run.path).config


def test_damaged_collected_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DT_PRETRAIN_CACHE", str(tmp_path))
    path = collected("hopper-medium", 500, progress=False)
    file = path / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="expected a readable .*, found"):
        load_trajectories("hopper-medium", n_steps=500)
    shutil.rmtree(path / "data")
    with pytest.raises(InputError, match="expected a Minari dataset"):
        load_trajectories("hopper-medium", n_steps=500)


def test_interrupted_collection_leaves_no_dataset(tmp_path, monkeypatch):
    import dt_pretrain.collection as collection
    monkeypatch.setenv("DT_PRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(collection, "write_minari", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        collected("hopper-medium", 500, progress=False)
    assert not (tmp_path / "datasets" / "hopper-medium-500-s0").exists()
    monkeypatch.undo()
    monkeypatch.setenv("DT_PRETRAIN_CACHE", str(tmp_path))
    assert load_trajectories("hopper-medium", n_steps=500, progress=False).n_steps >= 500


# malformed input, through every public loader and the command line

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path


def hdf5(path, **arrays):
    "A small D4RL file with some arrays instead of the right ones; None leaves one out."
    n, right = 9, dict(observations=(9, 11), actions=(9, 3), rewards=(9,))
    all_arrays = {k: np.zeros(v, np.float32) for k, v in right.items()} | dict(terminals=np.arange(n) == n - 1, timeouts=np.zeros(n, bool)) | arrays
    with h5py.File(path, "w") as f:
        for k, v in all_arrays.items():
            if v is not None:
                f[k] = v
    return path


def a_run(tmp, **files):
    "A finished run with some files replaced."
    run = Run(run_folder(make_config("smoke"), tmp / "runs"))
    for name, content in {"config.json": json.dumps(asdict(make_config("smoke"))), "manifest.json": '{"status": "finished", "last_epoch": 0, "seconds": 1}', **files}.items():
        write(run.path / name, content)
    return run


def parquet(tmp, **columns):
    write(tmp / "hopper-medium-v2/train/0.parquet", b"")
    pd.DataFrame(columns).to_parquet(tmp / "hopper-medium-v2/train/0.parquet")
    return load_trajectories("hopper-medium", "hf", tmp)


def d4rl(tmp, **arrays):
    return load_trajectories("hopper-medium", "d4rl", hdf5(tmp / "x.hdf5", **arrays))


def backbone(tmp, config, name="model.safetensors", weights=b""):
    write(tmp / "model/config.json", config if isinstance(config, str) else json.dumps(config))
    write(tmp / "model" / name, weights)
    return load_backbone(str(tmp / "model"))


def sweep_of(tmp, text, preset="smoke", **more):
    return read_sweep(write(tmp / "s.toml", text), preset, **more)


GPT2 = dict(model_type="gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=4)
RUNS = "[[runs]]\nseeds = {smoke = 1}\n"
FINETUNE = ["finetune", "--preset", "smoke", "--set"]

# What is malformed: how to try it (arguments of the command line, or a function of an empty folder), and what the message must say.
MALFORMED = {
    # tensors and tables
    "no safetensors file": (lambda t: load_tensors(t / "x.safetensors"), "x.safetensors: expected a safetensors file, found none"),
    "an empty safetensors file": (lambda t: load_tensors(write(t / "x.safetensors", b"")), "x.safetensors: expected a complete safetensors file"),
    "a folder as safetensors file": (lambda t: load_tensors(t), "expected a complete safetensors file"),
    "facts that are not JSON": (lambda t: (safetensors.torch.save_file({}, t / "x.safetensors", metadata=dict(facts="{")), load_tensors(t / "x.safetensors")), "x.safetensors: expected a complete safetensors file"),
    "text as parquet": (lambda t: read_table(write(t / "x.parquet", "hello")), "x.parquet: expected a complete parquet file"),
    "no parquet file": (lambda t: read_table(t / "x.parquet"), "x.parquet: expected a complete parquet file"),
    # runs
    "config.json is a list": (lambda t: a_run(t, **{"config.json": "[]"}).config, "config.json: expected a JSON object, found list"),
    "config.json is cut off": (lambda t: a_run(t, **{"config.json": '{"task": "hop'}).config, "config.json: expected a complete JSON file"),
    "config.json is binary": (lambda t: a_run(t, **{"config.json": bytes(range(256))}).config, "config.json: expected a complete JSON file"),
    "config.json nests without end": (lambda t: a_run(t, **{"config.json": "[" * 100_000}).config, "config.json: expected a complete JSON file"),
    "config.json with a value of another type": (lambda t: a_run(t, **{"config.json": json.dumps(asdict(make_config("smoke")) | dict(epochs="many"))}).config, "config.json: epochs: expected a whole number, found 'many'"),
    "manifest.json is a number": (lambda t: a_run(t, **{"manifest.json": "3"}).status, "manifest.json: expected a JSON object, found int"),
    "manifest.json with an unknown status": (lambda t: a_run(t, **{"manifest.json": '{"status": "won"}'}).status, "manifest.json: expected a status: running, finished or failed, found 'won'"),
    "manifest.json with half an epoch": (lambda t: a_run(t, **{"manifest.json": '{"status": "running", "last_epoch": 1.5}'}).last_epoch, "manifest.json: expected last_epoch, a whole number, found 1.5"),
    "a run without metrics": (lambda t: a_run(t).metrics, "metrics.parquet: expected a complete parquet file"),
    "an epoch that a run does not have": (lambda t: load_model(a_run(t), 7), "expected one of [], found 7"),
    "a folder with one bad run": (lambda t: (a_run(t, **{"manifest.json": "{"}), find_runs(t / "runs")), "manifest.json: expected a complete JSON file"),
    "a packed run that is no tar file": (lambda t: unpack(b"hello", t / "run"), "packed run: expected a tar file"),
    # data
    "a D4RL file of text": (lambda t: load_trajectories("hopper-medium", "d4rl", write(t / "x.hdf5", "hello")), "x.hdf5: expected a complete D4RL HDF5 file"),
    "a D4RL file cut off": (lambda t: load_trajectories("hopper-medium", "d4rl", write(t / "x.hdf5", hdf5(t / "y.hdf5").read_bytes()[:900])), "x.hdf5: expected a complete D4RL HDF5 file"),
    "a D4RL file without rewards": (lambda t: d4rl(t, rewards=None), "x.hdf5, for hopper-medium: expected D4RL's arrays in the task's shapes, found Dataset is missing key rewards"),
    "a D4RL file without timeouts": (lambda t: d4rl(t, timeouts=None), "x.hdf5: expected an array 'timeouts'"),
    "a D4RL file of another robot": (lambda t: d4rl(t, observations=np.zeros((9, 17), np.float32)), "x.hdf5, for hopper-medium: expected D4RL's arrays in the task's shapes"),
    "a D4RL file with NaN": (lambda t: d4rl(t, rewards=np.full(9, np.nan, np.float32)), "x.hdf5: rewards: expected finite numbers, found 9 NaN or infinite"),
    "a D4RL file with actions beyond the limits": (lambda t: d4rl(t, actions=np.full((9, 3), 7, np.float32)), "x.hdf5: actions: expected values in [-1, 1], found up to 7"),
    "a D4RL file with more actions than rewards": (lambda t: d4rl(t, actions=np.zeros((12, 3), np.float32)), "x.hdf5: expected arrays of one length, found"),
    "a D4RL file without a step": (lambda t: d4rl(t, observations=np.zeros((0, 11), np.float32), actions=np.zeros((0, 3), np.float32), rewards=np.zeros(0, np.float32), terminals=np.zeros(0, bool), timeouts=np.zeros(0, bool)), "x.hdf5: expected at least one episode, found none"),
    "a D4RL file of words": (lambda t: d4rl(t, rewards=np.array([b"one"] * 9)), "x.hdf5: rewards: expected arrays of one width, found could not convert string to float"),
    "a folder that is no Minari dataset": (lambda t: load_trajectories("hopper-medium", "minari", t), "expected a Minari dataset, a folder with 'data' in it, found something else"),
    "a Minari dataset with nothing in it": (lambda t: ((t / "data").mkdir(), load_trajectories("hopper-medium", "minari", t)), "expected a readable Minari dataset"),
    "a Minari dataset with a bad metadata file": (lambda t: (write(t / "data/metadata.json", "{"), write(t / "data/main_data.hdf5", b""), load_trajectories("hopper-medium", "minari", t)), "expected a readable Minari dataset"),
    "a mirror of text": (lambda t: (write(t / "hopper-medium-v2/0.parquet", "hello"), load_trajectories("hopper-medium", "hf", t)), "0.parquet: expected a complete parquet file"),
    "a mirror with other columns": (lambda t: parquet(t, a=[1]), "0.parquet: expected columns ['observations', 'actions', 'rewards'], found ['a']"),
    "a mirror with ragged rows": (lambda t: parquet(t, observations=[[[0.0] * 11, [0.0] * 3]], actions=[[[0.0] * 3] * 2], rewards=[[[0.0], [0.0]]]), "hopper-medium-v2: observations: expected arrays of one width, found setting an array element with a sequence"),
    "a mirror with words": (lambda t: parquet(t, observations=[["a"]], actions=[["b"]], rewards=[["c"]]), "hopper-medium-v2: observations: expected arrays of one width, found could not convert string to float: 'a'"),
    "a policy with other tensors": (lambda t: (save_tensors(t / "x.safetensors", dict(a=torch.zeros(1))), Policy(t / "x.safetensors", get_task("hopper-medium"))), "x.safetensors: expected tensors"),
    "a task that nobody knows": (lambda t: load_trajectories("pong"), "task: expected one of hopper-medium"),
    # backbones
    "a model folder without a configuration": (lambda t: load_backbone(str(t)), "(local folder): expected one of random"),
    "a model with a configuration of text": (lambda t: backbone(t, "hello"), ("model (local folder): expected", "model/config.json' is not a valid JSON file")),
    "a model of an architecture that nobody knows": (lambda t: backbone(t, dict(model_type="t5", d_model=8)), "architecture of the backbone: expected one of gpt2"),
    "a model with empty weights": (lambda t: backbone(t, GPT2), "model (local folder): expected weights in complete safetensors files"),
    "a model whose weights do not fit": (lambda t: backbone(t, GPT2, weights=safetensors.torch.save(dict(a=torch.zeros(1)))), "model (local folder): expected all tensors of its configuration"),
    "a model with a number of heads that is none": (lambda t: backbone(t, GPT2 | dict(n_head="two")), ("model (local folder): expected", "found Validation error for field 'n_head'")),
    "a GGUF file of text": (lambda t: load_backbone(str(write(t / "x.gguf", "hello"))), "x.gguf: expected a GGUF file, found one that starts with b'hell'"),
    "a GGUF file with only a beginning": (lambda t: load_backbone(str(write(t / "x.gguf", b"GGUF"))), "x.gguf: expected one of random, image, language, synthetic-iid, synthetic-markov, a folder written by save_pretrained, a GGUF file"),
    "no GGUF file": (lambda t: load_backbone(str(t / "x.gguf")), "x.gguf: expected a GGUF file, found nothing"),
    "no initialisation": (lambda t: load_backbone(" "), "initialisation: expected a name, found ' '"),
    "a name of 5000 letters": (FINETUNE + ["initialisation=" + "a" * 5000], "initialisation: expected a name or a path"),
    "a name of 300 letters": (FINETUNE + ["initialisation=" + "a" * 300], "initialisation: expected a name or a path"),
    "the folder that one is in": (FINETUNE + ["initialisation=."], ". (local folder): expected one of random,"),
    "a donor of 300 letters": (FINETUNE + ["block=0", "donor=" + "a" * 300], "initialisation: expected a name or a path"),
    "weights that the paper's scale does not have": (["finetune", "--preset", "paper", "--set", "initialisation=synthetic-markov"], "which is there for the presets smoke and mini alone"),
    "a name with a zero byte": (FINETUNE + ['initialisation="a\\u0000b"'], "initialisation: expected a name or a path"),
    # sweeps, results, notebooks
    "a sweep that is a folder": (lambda t: read_sweep(t / "..", "smoke"), "expected a sweep file, found Is a directory"),
    "a sweep of bytes": (lambda t: read_sweep(write(t / "s.toml", b"\xff\xfe"), "smoke"), "s.toml: expected TOML"),
    "a sweep with other tables": (lambda t: sweep_of(t, RUNS + "[other]"), "s.toml: expected [[runs]] tables, and nothing else but `report = false`, found runs, other"),
    "a sweep with seeds in words": (lambda t: sweep_of(t, '[[runs]]\nseeds = {smoke = "three"}'), "s.toml: seeds: expected a number for each preset"),
    "a sweep with a date": (lambda t: sweep_of(t, RUNS + "epochs = 2026-01-01"), "s.toml: epochs: expected a whole number"),
    "a sweep with a table of tables": (lambda t: sweep_of(t, RUNS + "setup = {a = 1}"), "s.toml: setup: expected a value, a list of them, or either for each preset"),
    "a sweep of a preset that nobody knows": (lambda t: sweep_of(t, RUNS, "huge"), "preset: expected one of smoke, mini, paper, found 'huge'"),
    "a sweep file that is not there": (["sweep", "nowhere.toml"], "nowhere.toml: expected a sweep file, found No such file"),
    "a status of no seeds": (["status", "sanity", "--seeds", "0"], "seeds: expected at least 1, found 0"),
    "a sweep with no jobs": (["sweep", "sanity", "--jobs", "0"], "jobs: expected at least 1, found 0"),
    "a sweep whose runs folder is a file": (["sweep", "sanity", "--preset", "smoke", "--engine", "here", "--runs-dir", "README.md"], "README.md: expected a folder for runs, found a file"),
    "a sweep with less than no GPU": (["sweep", "sanity", "--engine", "ray", "--gpus-per-run", "-1"], "GPUs a run: expected at least 0"),
    "a notebook that is not there": (lambda t: execute_notebook(t / "x.ipynb", t / "y.ipynb"), "x.ipynb: expected a notebook, found none"),
    "a result of text": (lambda t: (write(t / "1.json", "hello"), read_results(t)), "1.json: expected complete JSON"),
    "a result that is a list": (lambda t: (write(t / "1.json", "[1]"), read_results(t)), "1.json: expected fields number"),
    # the command line
    "data from nowhere": (["collect", "--source", "web"], "source: expected 'collect', 'minari', 'd4rl', 'hf', found 'web'"),
    "no data": (["collect", "--steps", "0"], "n_steps: expected at least 1, found 0"),
    "a D4RL file that is not there": (["collect", "--source", "d4rl", "--path", "nothing.hdf5"], "nothing.hdf5: expected a D4RL HDF5 file, found none"),
    "a Minari dataset that is not there": (["collect", "--source", "minari", "--path", "nowhere"], "nowhere: expected a Minari dataset"),
    "a Minari dataset without a path": (["collect", "--source", "minari"], "path: expected the folder of a Minari dataset"),
    "a mirror that is not there": (["collect", "--source", "hf", "--path", "nowhere"], "nowhere: expected hopper-medium-v2/**/*.parquet, found no such file"),
    "a mirror without a network": (["collect", "--source", "hf"], "expected a download, or a local copy given as path"),
    "a setup that nobody knows": (FINETUNE + ["setup=fair"], "setup: expected one of paper, controlled, found 'fair'"),
    "a value without a name": (FINETUNE + ["=3"], "--set =3: expected name=value"),
    "a name without a value": (FINETUNE + ["epochs"], "--set epochs: expected name=value, found no ="),
    "a value given twice": (FINETUNE + ["seed=1", "epochs=2", "--set", "seed=2"], "--set seed: expected one value, found another one: seed=2"),
    "a preset among the values": (FINETUNE + ["preset=mini"], "--set preset=mini: expected any other value: it has the option --preset"),
    "a preset that nobody knows": (["finetune", "--preset", "huge"], "preset: expected one of smoke, mini, paper, found 'huge'"),
    "a report of a preset that nobody knows": (["report", "--preset", "huge"], "preset: expected one of smoke, mini, paper, found 'huge'"),
    "a status of a preset that nobody knows": (["status", "sanity", "--preset", "huge"], "preset: expected one of smoke, mini, paper, found 'huge'"),
    "a misspelt name": (FINETUNE + ["sead=3"], "'sead': expected one like 'seed', found an unknown name"),
    "an infinite learning rate": (FINETUNE + ["learning_rate=inf"], "learning_rate: expected at least 0, found inf"),
    "a learning rate that is not a number": (FINETUNE + ["learning_rate=nan"], "learning_rate: expected at least 0, found nan"),
    "a fraction of an epoch": (FINETUNE + ["epochs=0.5"], "epochs: expected a whole number, found 0.5"),
    "a context longer than an episode": (FINETUNE + ["context_length=1001"], "context_length: expected at most 1000"),
    "a seed below zero": (FINETUNE + ["seed=-1"], "seed: expected at least 0, found -1"),
    "a width that heads do not divide": (FINETUNE + ["width=33"], "architecture: expected at least one layer, and a number of heads that divides the width"),
    "a model that is nowhere": (FINETUNE + ["initialisation=nobody/nothing"], "nobody/nothing (hub): expected one of random,"),
    "a donor without a block": (FINETUNE + ["donor=language"], "donor and block: expected both, or none"),
    "a block that is not there": (FINETUNE + ["donor=language", "block=9", "initialisation=language"], "block: expected 0 to 2, found 9"),
    "a device that is not there": (FINETUNE[:3] + ["--device", "abacus"], "device: expected one that torch finds here, such as cpu, found 'abacus'"),
    "a file as runs folder": (["finetune", "--preset", "smoke", "--runs-dir", "README.md"], ": expected a folder to write to, found [Errno 20] Not a directory"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_input_is_one_line_and_exit_code_2(case, cli, tmp_path, monkeypatch):
    how, message = MALFORMED[case]
    monkeypatch.setenv("DT_PRETRAIN_RUNS", str(tmp_path / "runs"))
    if callable(how):   # as a command that does just this
        from dt_pretrain import cli as command_line
        monkeypatch.setattr(command_line, "_doctor", lambda args: how(tmp_path))
    code, said = cli(*(["doctor"] if callable(how) else how))
    assert all(m in said for m in ([message] if isinstance(message, str) else message)) and (code, said.count("\n")) == (2, 1)


def test_there_are_60_of_them():
    assert len(MALFORMED) >= 60


def test_unwritable_cache(cli, top, monkeypatch):
    monkeypatch.setenv("DT_PRETRAIN_CACHE", str(top / "README.md"))
    code, said = cli("collect", "--steps", "500")
    assert "expected a folder to write collected data to" in said and code == 2


def test_unknown_choice_is_refused_by_the_parser(cli):
    code, said = cli("report", "--task", "moonlander")
    assert "invalid choice: 'moonlander'" in said and code == 2


def test_the_installed_command_gives_no_traceback():
    done = subprocess.run([Path(sys.executable).with_name("dt-pretrain"), "finetune", "--set", "epochs"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "dt-pretrain: --set epochs: expected name=value, found no =\n")

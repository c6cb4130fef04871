"What must not happen to a user's files, and what the command line says to bad input."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import pytest

from dt_pretrain.collection import collected, load_trajectories
from dt_pretrain.finetuning import finetune, load_model
from dt_pretrain.runs import save_tensors
from dt_pretrain.setups import make_config
from dt_pretrain.tasks import InputError


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


@pytest.mark.parametrize("args, message", [
    (["collect", "--source", "web"], "source: expected 'collect', 'minari', 'd4rl', 'hf', found 'web'"),
    (["collect", "--steps", "0"], "n_steps: expected at least 1, found 0"),
    (["collect", "--source", "d4rl", "--path", "nothing.hdf5"], "nothing.hdf5: expected a D4RL HDF5 file, found none"),
    (["collect", "--source", "minari", "--path", "nowhere"], "nowhere: expected a Minari dataset"),
    (["collect", "--source", "hf", "--path", "nowhere"], "nowhere: expected hopper-medium-v2/**/*.parquet, found no such file"),
    (["collect", "--source", "hf"], "expected a download, or a local copy given as path"),
    (["finetune", "--set", "setup=fair"], "setup: expected one of paper, controlled, found 'fair'"),
    (["finetune", "--set", "initialisation=nobody/nothing"], "nobody/nothing (hub): expected a model on the hub that can be reached, or a local folder"),
    (["finetune", "--preset", "smoke", "--runs-dir", "README.md"], "a folder to write to"),
])
def test_command_line_says_what_is_wrong(cli, args, message):
    code, said = cli(*args)
    assert message in said and code == 2


def test_unwritable_cache(cli, top, monkeypatch):
    monkeypatch.setenv("DT_PRETRAIN_CACHE", str(top / "README.md"))
    code, said = cli("collect", "--steps", "500")
    assert "expected a folder to write collected data to" in said and code == 2


def test_unknown_choice_is_refused_by_the_parser(cli):
    code, said = cli("report", "--preset", "huge")
    assert "invalid choice: 'huge'" in said and code == 2


def test_the_installed_command_gives_no_traceback():
    done = subprocess.run([Path(sys.executable).with_name("dt-pretrain"), "finetune", "--set", "epochs"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "dt-pretrain: --set epochs: expected name=value, found no =\n")

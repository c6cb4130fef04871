"Experiments and pages end to end, through papermill, at the smoke preset."
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from dt_pretrain.execution import execute_notebook
from dt_pretrain.runs import Run, find_runs
from dt_pretrain.setups import make_config, run_name
from dt_pretrain.sweeps import run_sweep
from dt_pretrain.tasks import InputError


@pytest.fixture
def experiment(top, tmp_path):
    "Execute an experiment into a temporary folder."
    def run(name, **parameters):
        execute_notebook(top / "nbs" / "experiments" / f"{name}.ipynb", tmp_path / f"{name}.ipynb", parameters)
    return run


def test_collect(experiment, monkeypatch, tmp_path):
    monkeypatch.setenv("DT_PRETRAIN_CACHE", str(tmp_path / "cache"))
    experiment("collect", task="halfcheetah-medium", n_steps=2000)
    assert (tmp_path / "cache/datasets/halfcheetah-medium-2000-s0/data/main_data.hdf5").is_file()


def test_head_offset(experiment, tmp_path):
    small = dict(preset="smoke", n_layer=1, width=64, updates=4, seeds=1)
    experiment("head_offset", constants=[0.0, 4.0], **small)
    told = [o["data"]["text/markdown"] for c in nbformat.read(tmp_path / "head_offset.ipynb", 4).cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    assert re.search(r"Of 1 run given an offset above the spread \(similarity 0\.[89]\d to 0\.[89]\d\), [01] had fewer than half of their outputs saturated after 4 updates \(95 % interval of the share (0% to 98%|3% to 100%);", told[-1]), told
    for bad, message in (([-1.0], "constants: expected at least 0, found -1.0"), ("[0.0]", "'constants': expected a list of numbers, found '[0.0]'")):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            experiment("head_offset", constants=bad, **small)


def test_head_format(experiment, tmp_path):
    experiment("head_format", preset="smoke", seeds=1, initialisations=["random"])
    page = nbformat.read(tmp_path / "head_format.ipynb", 4)
    told = " ".join(o["data"].get("text/markdown", "") + o["data"].get("text/html", "") for c in page.cells for o in c.get("outputs", []) if "data" in o)
    assert "random weights, float32 against bfloat16: " in told and "random weights, mixed against bfloat16: " in told
    assert all(f">{precision}</td>" in told for precision in ("float32", "bfloat16", "mixed"))
    for bad, message in ((dict(precisions=["float16"]), "precision: expected one of float32, bfloat16, mixed, found 'float16'"), (dict(seeds=0), "seeds: expected at least 1, found 0")):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            experiment("head_format", preset="smoke", initialisations=["random"], **bad)


def test_head_centre(experiment, tmp_path):
    "A centred body sees no states alike and has no offset; a cancelled one has no offset either, and sees them as before. What is kept is not made again."
    given = dict(preset="smoke", initialisation="random", n_layer=1, width=64, updates=4, points=2, seeds=[0], out_dir=str(tmp_path / "kept"))
    experiment("head_centre", **given)
    kept = {p.stem.split("-")[-2]: pd.read_parquet(p) for p in (tmp_path / "kept").glob("*.parquet")}
    start = {v: t.iloc[0] for v, t in kept.items()}
    assert set(kept) == {"centred", "cancelled"} and all(t.updates.to_list() == [0, 2, 4] for t in kept.values())
    assert abs(start["centred"].similarity) < 0.02 < start["cancelled"].similarity
    assert start["centred"].offset == pytest.approx(start["cancelled"].offset, abs=1e-4) and start["centred"].spread == pytest.approx(start["cancelled"].spread, abs=1e-4)
    assert start["centred"].offset < 0.2 * start["centred"].spread
    assert kept["centred"].held_out_error.iloc[-1] != kept["centred"].held_out_error.iloc[0]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").iterdir()}
    experiment("head_centre", **given)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").iterdir()} == stamps
    for bad, message in ((dict(seeds=3), "'seeds': expected a list of whole numbers, found 3"), (dict(points=3), "points: expected a number that divides the updates, 4, found 3"), (dict(updates=2), "expected a curve of updates 2, found 4"), (dict(width=128), "expected a curve of the configuration controlled-random-K1-s0-[0-9a-f]+, found controlled-random-K1-s0-"), (dict(out_dir=None), "out_dir: expected a folder for curves of anything but the bodies of preset paper, found None")):
        with pytest.raises(RuntimeError, match=message):
            experiment("head_centre", **given | bad)


@pytest.mark.skipif(importlib.util.find_spec("stable_baselines3") is None, reason="the extra 'collect' is not installed")
def test_train_policies(experiment, tmp_path):
    experiment("train_policies", max_steps=200, evaluate_every=100, eval_episodes=1, learning_starts=50, out_dir=str(tmp_path))
    assert json.loads((tmp_path / "hopper-medium-sac.json").read_text())["train_steps"] >= 200


@pytest.mark.parametrize("parameters, message", [
    (dict(contxt_length=1), "expected one like 'context_length', found an unknown name"),
    (dict(context_length="one"), "context_length: expected a whole number, found 'one'"),
    (dict(learning_rate=-1.0), "learning_rate: expected at least 0, found -1.0"),
    (dict(until="abc"), "parameter 'until': expected a whole number or nothing, found 'abc'"),
])
def test_bad_parameters_stop_before_anything_runs(experiment, tmp_path, parameters, message):
    with pytest.raises(RuntimeError, match=message):
        experiment("finetune", runs_dir=str(tmp_path / "runs"), **parameters)
    assert not (tmp_path / "runs").exists()


def test_unknown_parameters_are_refused_before_anything_runs(top, tmp_path):
    with pytest.raises(RuntimeError, match="parameter 'sead': expected one of .*, found an unknown name"):
        execute_notebook(top / "nbs/findings/5_no_context.ipynb", tmp_path / "out.ipynb", dict(sead=3))
    assert [p.name for p in tmp_path.iterdir()] == ["out.failed.ipynb"]


TOP = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("notebook", sorted(str(p.relative_to(TOP)) for p in (TOP / "nbs").rglob("*.ipynb") if p.parent.name != "components" and '"parameters"' in p.read_text()))
def test_every_notebook_knows_its_parameters_and_their_types(top, notebook):
    "Its defaults pass; a value of another type, and a name that it does not have, are refused."
    cells = [c for c in nbformat.read(top / notebook, 4).cells if c.cell_type == "code"]
    first = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    given = {}
    exec(cells[first].source, given)
    names = [n for n in given if not n.startswith("_")]
    def take(**parameters):
        variables = {n: given[n] for n in names} | parameters
        exec(cells[first + 1].source, variables)
        return variables["parameters"]
    trains = notebook.endswith("finetune.ipynb")   # and leaves most to make_config
    assert names and take() == {n: given[n] for n in names if not trains or n not in ("runs_dir", "device", "until")}
    for name in ("runs_dir", "device", "until") if trains else names:
        with pytest.raises(InputError, match=f"^parameter '{name}': expected .*, found {{'a': 1}} .dict.$"):
            take(**{name: {"a": 1}})
        refused = []
        for value in (5, "five"):
            try:
                take(**{name: value})
            except InputError:
                refused.append(value)
        assert refused, f"{name} may be a number and a word"
    if trains:
        return
    with pytest.raises(InputError, match="parameter 'sead': expected one of .*, found an unknown name"):
        take(sead=3)


def test_sweep_keeps_going_and_is_not_repeated(top, tmp_path):
    notebook = top / "nbs/experiments/finetune.ipynb"
    good, bad = make_config("smoke", seed=3), make_config("smoke", seed=3, source="minari", path=str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed:\n.*expected a Minari dataset"):
        run_sweep([bad, good], notebook, tmp_path, jobs=2, progress=False)
    run = Run(tmp_path / good.task / run_name(good))
    assert run.status == "finished" and (run.path / "finetune.ipynb").is_file()
    stamp = (run.path / "finetune.ipynb").stat().st_mtime_ns
    run_sweep([good], notebook, tmp_path, progress=False)
    assert (run.path / "finetune.ipynb").stat().st_mtime_ns == stamp


def test_full_scale_keeps_what_runs_have_measured(experiment, tmp_path):
    "Begun and finished runs; what is kept stays when the runs are gone."
    from dt_pretrain.finetuning import finetune
    from dt_pretrain.full_scale_keeping import read_kept
    from dt_pretrain.sweeps import read_sweep
    (tmp_path / "few.toml").write_text("[[runs]]\ncontext_length = 1\nhead = ['tied', 'linear']\nn_layer = 1\nwidth = 16\nn_head = 2\nseeds = {smoke = 2}\n")
    configs = read_sweep(tmp_path / "few.toml", "smoke")
    for c, until in zip(configs[:3], (None, 1, 0), strict=True):   # the last one is not begun
        finetune(c, tmp_path / "runs", "cpu", progress=False, until=until)
    given = dict(preset="smoke", sweeps=[str(tmp_path / "few.toml")], episodes=2, out_dir=str(tmp_path / "kept"))
    experiment("full_scale", runs_dir=str(tmp_path / "runs"), **given)
    kept = read_kept(folder=tmp_path / "kept")
    assert kept.groupby("run").epoch.max().to_dict() == {run_name(configs[0]): 2, run_name(configs[1]): 1}   # not the run before training
    assert read_kept(name="-play", folder=tmp_path / "kept").returns.str.len().to_list() == [2, 2]
    assert all(f"| hopper-medium | {run_name(c)} |" in (tmp_path / "kept/README.md").read_text() for c in configs[:2])
    experiment("full_scale", runs_dir=str(tmp_path / "nowhere"), **given | dict(episodes=3))
    assert read_kept(folder=tmp_path / "kept").equals(kept)
    assert "returns of 2 episodes" in (tmp_path / "kept/README.md").read_text()   # those that were played


def test_kept_full_scale_results_belong_together():
    "Every kept run's name, manifest and metrics say the same; every run was one of a sweep; the measures are of kept runs."
    from dt_pretrain.full_scale import HEADS, verdicts_by_length
    from dt_pretrain.full_scale_keeping import kept_folder, kept_tasks, read_kept
    from dt_pretrain.setups import FinetuneConfig
    from dt_pretrain.sweeps import read_sweep
    for task in kept_tasks():
        swept = {run_name(c) for s in ("full_scale", "full_scale_context") for c in read_sweep(s, "paper", task=task)}
        manifests = json.loads((kept_folder() / f"{task}-manifests.json").read_text())
        metrics = read_kept(task)
        assert set(metrics.run) == set(manifests) <= swept
        for name, runs in metrics.groupby("run"):
            c = FinetuneConfig(**manifests[name]["config"])
            assert run_name(c) == name and c.task == task
            assert runs[["initialisation", "setup", "head", "context_length", "seed"]].drop_duplicates().values.tolist() == [[c.initialisation, c.setup, c.head, c.context_length, c.seed]]
            assert runs.epoch.tolist() == list(range(manifests[name]["last_epoch"] + 1))
        for path in kept_folder().glob(f"{task}-*.parquet"):
            measured, newest = read_kept(task, path.stem.removeprefix(task)), metrics.groupby("run").epoch.max()
            assert (measured.epoch <= measured.run.map(newest)).all(), path.name
    assert {h: [v["updates"] for v in verdicts_by_length(read_kept(), h)] for h in HEADS} == {"tied": [630, 2520], "linear": [630, 2520]}


@pytest.mark.timeout(1500)
def test_report_at_smoke_scale(checkout, monkeypatch, tmp_path):
    "What `make report` promises: all runs, all pages, the site."
    from dt_pretrain.report import all_runs, execute_pages, keep, refresh, report
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("DT_PRETRAIN_RUNS", str(tmp_path / "runs"))
    front = report("smoke", jobs=2, say=lambda *_: None)
    configs = all_runs(checkout / "nbs", "smoke", "hopper-medium")
    assert sorted(r.path.name for r in find_runs(tmp_path / "runs")) == sorted(map(run_name, configs))
    results = [json.loads((checkout / f"_report/pages/findings/results/{n}.json").read_text()) for n in range(8)]
    assert {(r["preset"], r["verdict"]) for r in results} == {("smoke", "inconclusive")}
    metrics = pd.concat(r.metrics for r in find_runs(tmp_path / "runs"))
    assert set(metrics.epoch) == {0, 1, 2} and metrics[["held_out_error", "return_mean"]].notna().all().all()
    home = (checkout / "_report/pages/index.ipynb").read_text()
    assert "seven are inconclusive" in home and "injected-parameters" not in home
    assert all(f"findings/{p.stem}.html" in front.read_text() for p in (checkout / "nbs/findings").glob("[1-7]_*.ipynb"))
    listed = (front.parent / "experiments/runs.html").read_text()
    assert all((front.parent / f"runs/hopper-medium/{run_name(c)}.html").exists() and run_name(c) in listed for c in configs)
    (checkout / "_report/times.json").unlink()             # pages say themselves what they were made of
    page = checkout / "nbs/findings/1_feature_reuse.ipynb"
    untouched = page.read_text()
    edited = json.loads(untouched)
    edited["cells"][1]["source"] = ["# somebody wrote this after the report"]
    page.write_text(json.dumps(edited))
    with pytest.raises(InputError, match="findings/1_feature_reuse.ipynb: expected what was executed"):
        keep(say=lambda *_: None)
    assert json.loads(page.read_text()) == edited
    page.write_text(untouched)
    keep(say=lambda *_: None)
    assert "inconclusive" in (checkout / "README.md").read_text()
    before = {p: p.read_text() for p in (checkout / "nbs").rglob("*.ipynb")}
    subprocess.run([Path(sys.executable).with_name("nbdev_clean")], check=True, cwd=checkout)
    assert [p.name for p in before if p.read_text() != before[p]] == []
    shutil.rmtree(tmp_path / "runs")                       # what is kept is enough to make the pages again, whatever they say
    again = sorted(f"findings/{p.stem}" for p in before if p.parent.name == "findings" and p.stem != "full_scale")
    saved = {n: (checkout / f"nbs/{n}.ipynb").read_text() for n in again}
    refresh(again, say=lambda *_: None)
    assert len(again) == 9 and [n for n in again if (checkout / f"nbs/{n}.ipynb").read_text() != saved[n]] == []
    # a report that fails keeps the last one, and says where its failed page is
    pages = {p: p.read_text() for p in (checkout / "_report/pages").rglob("*.ipynb")}
    with pytest.raises(RuntimeError, match="unfinished/findings/0_sanity.failed.ipynb"):
        execute_pages(checkout / "nbs", checkout / "_report/pages", dict(preset="smoke", task="hopper-medium", seeds=None, runs_dir=str(tmp_path / "runs")))
    assert pages and {p: p.read_text() for p in pages} == pages
    shutil.rmtree(checkout / "_report/pages/findings/results")
    with pytest.raises(InputError, match="no pages/findings/results"):
        keep()

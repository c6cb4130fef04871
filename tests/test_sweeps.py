"Sweeps on this machine and on a cluster whose machines die; what is left when somebody stops them."
import errno
import importlib.util
import os
import shutil
import signal
import sys
import time
from unittest import mock

import psutil
import pytest
from filelock import FileLock
from soak import processes

from dt_pretrain.backbones import SHIPPED
from dt_pretrain.cli import main
from dt_pretrain.collection import collected, load_trajectories
from dt_pretrain.finetuning import finetune
from dt_pretrain.report import all_runs
from dt_pretrain.runs import Run, find_runs, runs_folder
from dt_pretrain.setups import make_config
from dt_pretrain.sweeps import Job, _begin_with_most_steps, check_sources, estimates, finished_runs, here, local, on_ray, pack, read_sweep, run_sweep, sweep_status, unpack
from dt_pretrain.tasks import InputError
from dt_pretrain.trajectories import write_minari

SWEEP = """
[[runs]]
context_length = 20
n_layer = 2
width = 32
n_head = 2
epochs = 3
steps_per_epoch = {steps}
seeds = {{smoke = {seeds}}}
"""


@pytest.fixture
def notebook(top):
    return top / "nbs/experiments/finetune.ipynb"


@pytest.fixture
def sweep(tmp_path):
    "A sweep file and its configurations."
    def write(steps=4, seeds=2):
        (tmp_path / "sweep.toml").write_text(SWEEP.format(steps=steps, seeds=seeds))
        collected("hopper-medium", 3000, progress=False)
        return tmp_path / "sweep.toml", read_sweep(tmp_path / "sweep.toml", "smoke")
    return write


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it does not happen"
        time.sleep(0.05)


def under_way(runs_dir):
    "Runs that have closed an epoch and are not finished."
    return [r for r in find_runs(runs_dir, finished=False) if r.status == "running" and r.last_epoch is not None]


def the_dead(processes):
    return [p for p in processes if not p.is_running() or p.status() == psutil.STATUS_ZOMBIE]


def command(said, *args):
    "The command line, in a process of its own; `said` is a file for standard error."
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell that starts tests in the background has it ignored
    sys.exit(main([str(a) for a in args]))


@pytest.mark.parametrize("signum, code, engine", [(signal.SIGINT, 130, "local"), (signal.SIGTERM, 143, "local"), (signal.SIGKILL, -9, "local"), (signal.SIGINT, 143, "here")])
def test_a_sweep_that_is_stopped_can_go_on_and_leaves_no_process(sweep, tmp_path, signum, code, engine):
    path, _ = sweep(steps=3000, seeds=1)
    args = "sweep", path, "--preset", "smoke", "--runs-dir", tmp_path / "runs", "--engine", engine, *["--jobs", "1"] * (engine == "local")
    process = processes.Process(target=command, args=(tmp_path / "said", *args))
    process.start()
    wait_for(lambda: under_way(tmp_path / "runs") or not process.is_alive())
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signum)
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == code
    assert "Traceback" not in said and ("the same command goes on from here" in said or signum == signal.SIGKILL)
    wait_for(lambda: the_dead(family) == family, 30)
    (run,) = find_runs(tmp_path / "runs", finished=False)
    assert run.status == "running" and not run.in_use()
    assert (run.path / "resume/stopped.safetensors").exists()   # in the middle of an epoch, even if the sweep itself was killed
    assert sweep_status([run.config], tmp_path / "runs").state.to_list() == ["stopped"]


def test_a_sweep_in_pieces_without_notebooks_ends_the_same(sweep, tmp_path):
    "Two seconds at a time, an epoch of each run in turn, as on a machine that is lent."
    path, configs = sweep(steps=250, seeds=2)
    args = "sweep", path, "--preset", "smoke", "--runs-dir", tmp_path / "runs", "--engine", "here", "--stride", "1"
    seen, minutes = [], 0.04
    while not seen or set(seen[-1].state) != {"trained"}:
        piece = processes.Process(target=command, args=(tmp_path / "said", *args, "--minutes", minutes))
        piece.start()
        piece.join()
        assert piece.exitcode == 0 and "Traceback" not in (tmp_path / "said").read_text()
        seen.append(sweep_status(configs, tmp_path / "runs"))
        if len(seen) > 1 and seen[-1].equals(seen[-2]):
            minutes *= 2   # the machine is too busy to get anything done in so short a time
        assert len(seen) < 50
    assert len(seen) > 2                                                       # it was in pieces
    epochs = [s.epoch.str[0].astype(int) for s in seen]
    assert all(e.max() - e.min() <= 1 for e in epochs)                         # and all runs got equally far
    for c in configs:
        run, alone = Job(c, None, tmp_path / "runs").run, finetune(c, tmp_path / "alone", progress=False)
        assert run.metrics.equals(alone.metrics)
        assert run.checkpoint_path(3).read_bytes() == alone.checkpoint_path(3).read_bytes()


def test_a_stage_in_notebooks_and_the_rest_without_leaves_no_stale_page(sweep, tmp_path, notebook):
    _, (config,) = sweep(seeds=1)
    job = Job(config, notebook, tmp_path)
    for _ in local(1)([Job(config, notebook, tmp_path, until=1)]):
        pass
    assert job.run.last_epoch == 1 and (job.run.path / "finetune.ipynb").exists()
    run_sweep([config], None, tmp_path, progress=False, engine=here("cpu", progress=False))
    assert job.trained and not job.done and sweep_status([config], tmp_path).state.to_list() == ["trained"]
    run_sweep([config], notebook, tmp_path, progress=False)
    assert job.done and job.run.manifest["starts"] == 2   # the notebook was made, nothing was trained again


def test_two_sweeps_at_once_share_the_work(sweep, tmp_path, notebook):
    _, configs = sweep(seeds=1)
    a, b = (local(1)([Job(c, notebook, tmp_path) for c in configs]) for _ in range(2))
    ended, rounds = {"a": [], "b": []}, {"a": a, "b": b}
    while rounds:
        for name in list(rounds):
            try:
                ended[name] += next(rounds[name])
            except StopIteration:
                del rounds[name]
    assert [(len(v), [e for _, e in v]) for v in ended.values()] == [(1, [None]), (0, [])]   # the second one saw that it was done
    assert find_runs(tmp_path)[0].manifest["starts"] == 1


def test_a_run_that_was_taken_a_moment_ago_is_waited_for(sweep, tmp_path, notebook, monkeypatch):
    job = Job(sweep(seeds=1)[1][0], notebook, tmp_path / "runs")
    job.run.path.mkdir(parents=True)
    looks, lock = [], FileLock(job.run.path / ".lock")
    lock.acquire()
    monkeypatch.setattr(Run, "in_use", lambda run: bool(looks.append(run)))   # it was free when we looked
    ended = []
    for ended in local(1)([job]):
        if len(looks) == 2:   # the notebook of the first look has failed
            lock.release()
        if ended:
            break
    assert ([error for _, error in ended], job.run.status, len(looks)) == ([None], "finished", 2)


def test_status_and_plan(sweep, tmp_path, cli, capsys):
    path, configs = sweep(seeds=3)
    finetune(configs[0], tmp_path / "runs", progress=False)
    failed = Job(configs[1], "", tmp_path / "runs")
    failed.fail("ValueError: no luck")
    assert sweep_status(configs, tmp_path / "runs").state.to_list() == ["trained", "failed", "to do"]   # finished, but without its notebook
    alike = estimates(configs, finished_runs(tmp_path / "runs"))
    assert alike["estimated from"].to_list() == ["1 run alike"] * 3 and alike.seconds.nunique() == 1
    assert main(["sweep", str(path), "--preset", "smoke", "--dry-run", "--runs-dir", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "no luck" in said and "1 run alike" in said and "hours to go" in said
    assert main(["status", str(path), "--preset", "smoke", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert "3 runs: " in capsys.readouterr().out
    finetune(configs[1], tmp_path / "runs", progress=False)
    assert sweep_status(configs[1:], tmp_path / "runs").state.to_list() == ["trained", "to do"]   # the error was of another attempt


def test_what_would_fail_is_said_before(tmp_path, cli):
    path, runs = tmp_path / "s.toml", tmp_path / "runs"
    path.write_text('[[runs]]\ninitialisation = ["random", "langauge-permuted"]\nseeds = {smoke = 1}\n')
    for more in ["--dry-run"], []:
        code, said = cli("sweep", path, "--preset", "smoke", "--runs-dir", runs, *more)
        assert (code, said) == (2, "dt-pretrain: initialisation: expected one like 'language', found 'langauge'\n")
    code, said = cli("sweep", path, "--preset", "smoke", "--runs-dir", runs, "--dry-run", "--jobs", 0)
    assert (code, said) == (2, "dt-pretrain: jobs: expected at least 1, found 0\n")
    assert not runs.exists()


@pytest.mark.parametrize("preset", ["smoke", "mini", "paper"])
def test_a_report_asks_for_no_weights_that_its_preset_does_not_have(top, tmp_path, preset):
    configs = all_runs(top / "nbs", preset, "hopper-medium", None)
    check_sources(configs, tmp_path)
    assert ("synthetic-markov" in {c.initialisation for c in configs}) == (preset != "paper")


def test_weights_and_donors_that_are_gone_are_missed_by_runs_to_come_alone(tmp_path):
    collected("hopper-medium", 3000, progress=False)
    at = shutil.copytree(SHIPPED / "synthetic-iid", tmp_path / "weights")
    first, second = (make_config("smoke", initialisation=str(at), seed=s) for s in (0, 1))
    given = make_config("smoke", donor=str(at), block=0)
    finetune(first, tmp_path / "runs", progress=False)
    check_sources([first, second, given], tmp_path / "runs")
    shutil.rmtree(at)
    check_sources([first], tmp_path / "runs")
    for config in second, given:
        with pytest.raises(InputError, match=f"{at}: expected a folder written by save_pretrained, or a GGUF file, found nothing there"):
            check_sources([first, config], tmp_path / "runs")


def test_a_relative_path_means_the_same_with_and_without_notebooks(tmp_path, notebook, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_minari(load_trajectories("hopper-medium", n_steps=3000), "data")
    monkeypatch.setenv("DT_PRETRAIN_RUNS", "here")
    configs = [make_config("smoke", source="minari", path="data", seed=s) for s in (0, 1, 2)]
    (a,) = run_sweep(configs[:1], notebook, "runs", jobs=1, progress=False)
    (b,) = run_sweep(configs[1:2], None, runs_folder(), progress=False, engine=here("cpu", progress=False))
    (c,) = run_sweep(configs[2:], notebook, "runs", jobs=1, progress=False, stride=1)   # each stage, too
    assert (a.status, b.status, c.status) == ("finished", "finished", "finished") and b.path.is_relative_to(tmp_path / "here")


def test_an_estimate_survives_a_damaged_neighbour(sweep, tmp_path, monkeypatch, capsys):
    _, configs = sweep()
    (tmp_path / "hopper-medium/broken").mkdir(parents=True)
    for name in ("config.json", "manifest.json"):
        (tmp_path / "hopper-medium/broken" / name).write_text("{")
    assert finished_runs(tmp_path) == [] and len(estimates(configs, [])) == 2
    monkeypatch.setenv("DT_PRETRAIN_RUNS", str(tmp_path))
    assert main(["doctor"]) == 0 and "0 finished of 1" in capsys.readouterr().out


ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra 'cluster' is not installed")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "A Ray cluster of two machines on this one, with room for one run each."
    import ray
    from ray.cluster_utils import Cluster
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as env:   # workers have the environment in which their machine was started
        env.setenv("XDG_CACHE_HOME", str(cache))
        made = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, num_gpus=0, include_dashboard=False))
        made.doomed = made.add_node(num_cpus=1, num_gpus=0)
    made.copies = cache / "dt_pretrain/runs"
    ray.init(address=made.address, log_to_driver=False, logging_level="error")
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@ray
def test_a_machine_of_the_cluster_dies(cluster, sweep, tmp_path, notebook):
    "All runs end, none twice, none lost."
    long, short = sweep(steps=400, seeds=2)[1], sweep(steps=4, seeds=1)[1]
    configs = long + short
    jobs, ended, killed = [Job(c, notebook, tmp_path) for c in configs], [], False
    for news in on_ray()(jobs):
        ended += news
        if not killed and len(under_way(tmp_path)) == 2:   # one on each machine
            cluster.remove_node(cluster.doomed, allow_graceful=False)
            killed = True
    assert killed and [e for _, e in ended] == [None] * 3 and all(j.done for j in jobs)
    starts = sorted(j.run.manifest["starts"] for j in jobs)
    assert starts == [1, 1, 2]                               # only the run on the machine that died was started again
    assert all(j.run.metrics.epoch.to_list() == [0, 1, 2, 3] for j in jobs)
    assert not list(tmp_path.glob(".shared-*"))


@ray
def test_results_come_back_where_no_folder_is_shared(cluster, sweep, tmp_path, notebook):
    _, configs = sweep(seeds=1)
    (job,), ended = [Job(c, notebook, tmp_path / "runs") for c in configs], []
    finetune(configs[0], tmp_path / "runs", device="cpu", progress=False, until=1)
    for news in on_ray(shared=False)([job]):
        ended += news
    assert ended == [(job, None)] and job.done and job.run.manifest["starts"] == 2   # it went on from what was sent
    wait_for(lambda: cluster.copies.exists() and not list(cluster.copies.glob("*/controlled*")))   # nothing is left on the worker
    alone = finetune(configs[0], tmp_path / "alone", device="cpu", progress=False)
    assert job.run.metrics.equals(alone.metrics)
    assert all(job.run.checkpoint_path(e).read_bytes() == alone.checkpoint_path(e).read_bytes() for e in range(4))


@ray
def test_a_worker_keeps_what_could_not_be_brought_back(cluster, sweep, tmp_path, notebook, monkeypatch):
    _, configs = sweep(steps=4, seeds=1)
    def swept():
        (job,) = [Job(c, notebook, tmp_path / "runs") for c in configs]
        return job, [error for news in on_ray(shared=False)([job]) for _, error in news]
    with monkeypatch.context() as full:
        full.setattr("dt_pretrain.sweeps.unpack", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        job, (error,) = swept()
    assert "No space left" in error and not job.done
    (kept,) = cluster.copies.glob("*/controlled*")
    (kept / "seen.txt").touch()
    job, errors = swept()
    assert errors == [None] and job.done and (job.run.path / "seen.txt").exists()   # found trained
    wait_for(lambda: not list(cluster.copies.glob("*/controlled*")))


def test_a_worker_begins_with_what_has_most_steps(sweep, tmp_path, notebook):
    _, (config,) = sweep(steps=4, seeds=1)
    ours, worker = (Job(config, notebook, tmp_path / name) for name in ("ours", "worker"))
    finetune(config, tmp_path / "ours", device="cpu", progress=False, until=1)
    first = (4, pack(ours.run.path))
    finetune(config, tmp_path / "ours", device="cpu", progress=False, until=2)
    second = (8, pack(ours.run.path))
    def begins(sent):
        _begin_with_most_steps(worker, sent)
        return worker.run.last_epoch
    assert [begins(None), begins(first), begins(first)] == [None, 1, 1]
    (worker.run.path / "resume/stopped.safetensors").touch()
    with FileLock(worker.run.path / ".notebook.lock"):
        assert begins(second) == 1                                           # somebody works on it
    assert begins(second) == 2 and not (worker.run.path / "resume/stopped.safetensors").exists()   # nothing of the older is left
    worker.run.path.rename(worker.run.path.with_name(f"{worker.run.path.name}.8.abc"))
    unpack(first[1], worker.run.path)
    assert begins(first) == 2 and len(list(worker.run.path.parent.glob("[!.]*"))) == 1   # what was kept is the run now
    worker.run.path.rename(worker.run.path.with_name(f"{worker.run.path.name}.8.abc"))
    finetune(config, tmp_path / "ours", device="cpu", progress=False)
    assert begins((12, pack(ours.run.path))) == 3


@ray
def test_a_cluster_without_gpus_says_so(cluster, sweep, tmp_path, notebook):
    _, configs = sweep()
    with pytest.raises(InputError, match="GPUs a run: expected .* at most 0"):
        run_sweep(configs, notebook, tmp_path, progress=False, engine=on_ray(gpus=0.5))

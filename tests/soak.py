"""Kill a run at random moments, again and again, and see that it ends as if it had been left alone.

    python tests/soak.py --kills 200
"""
import argparse
import collections
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.setdefault("DT_PRETRAIN_CACHE", str(Path(__file__).resolve().parents[1] / ".cache"))

VALUES = dict(epochs=4, steps_per_epoch=12, batch_size=8, n_layer=2, width=32, n_head=2, eval_max_steps=10)
PHASES = {"__init__": "setting up", "restore": "restoring", "train_step": "training", "fit": "evaluating", "evaluate": "evaluating", "close_epoch": "writing", "save_stopped": "writing"}
NAMES = list(PHASES.values())

# Processes are forked from a server that has imported everything: a start takes a moment instead of seconds, and a kill is as real.
# There is one server, with one list, for all tests.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["dt_pretrain.finetuning", "gymnasium", "mujoco", "minari", "transformers.models.gpt2.modeling_gpt2", "seaborn", "nbdev.test"])


def work(values, runs_dir, phase=None):
    "What the killed process does: one run. `phase` tells the others where it is."
    import torch
    from tqdm.auto import tqdm
    from dt_pretrain.finetuning import Trainer, finetune
    from dt_pretrain.runs import Run
    from dt_pretrain.setups import make_config
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())   # its own lives in shared memory, and a killed process would leave it there
    for owner in (Trainer, Run) if phase is not None else ():
        for method, name in PHASES.items():
            if method in vars(owner) and (owner, method) != (Run, "__init__"):
                setattr(owner, method, telling(vars(owner)[method], name, phase))
    finetune(make_config("smoke", **values), runs_dir, device="cpu", progress=False)


def telling(method, name, phase):
    number = NAMES.index(name)

    def wrapped(*args, **kwargs):
        before, phase.value = phase.value, number
        try:
            return method(*args, **kwargs)
        finally:
            phase.value = before
    return wrapped


def start(runs_dir, phase=None, values=VALUES):
    if phase is not None:
        phase.value = 0   # where the one before was killed
    process = processes.Process(target=work, args=(values, str(runs_dir), phase))
    process.start()
    return process


def run_of(runs_dir, values=VALUES):
    from dt_pretrain.runs import Run, run_folder
    from dt_pretrain.setups import make_config
    return Run(run_folder(make_config("smoke", **values), runs_dir))


def contents(run):
    "All that a run leaves, byte for byte; of the table of metrics the numbers."
    return {p.name: p.read_bytes() for p in sorted(run.path.glob("epoch_*.safetensors"))} | {"metrics": run.metrics.to_json(double_precision=15)}


def check_whole(run):
    "Read every file that has its final name; a reader may come at any time."
    from dt_pretrain.runs import load_tensors, read_table
    for p in run.path.rglob("*.safetensors"):
        load_tensors(p)
    for p in run.path.rglob("*.parquet"):
        read_table(p)
    assert isinstance(run.manifest, dict) and isinstance(run._json("config.json") if (run.path / "config.json").exists() else {}, dict)


def moment(process, phase, luck, whole):
    "Wait for a random moment of a run, a quarter of the times while it writes. Whether the process lives to see it."
    if luck.random() < 0.75:
        process.join(luck.uniform(0, whole))
    else:
        while process.is_alive() and NAMES[phase.value] != "writing":
            time.sleep(0.0002)
        process.join(luck.uniform(0, 0.03))
    return process.is_alive()


def soak(runs_dir, kills, luck, expected, sigterm=0.0):
    "Kill (or, with probability `sigterm`, ask to stop) until there were so many kills; returns what happened."
    run, seen, phase, begin, whole = run_of(runs_dir), collections.Counter(), processes.Value("i", 0, lock=False), time.time(), 1.0   # who is killed would keep a lock
    while seen["kills"] < kills or run.path.exists():
        process, signum, started, fresh = start(runs_dir, phase), signal.SIGTERM if luck.random() < sigterm else signal.SIGKILL, time.time(), not run.path.exists()
        if seen["kills"] < kills and moment(process, phase, luck, whole):
            os.kill(process.pid, signum)
        where = NAMES[phase.value]
        process.join()
        if process.exitcode:
            assert process.exitcode in ((-signal.SIGKILL,) if signum == signal.SIGKILL else (143, -signal.SIGTERM)), process.exitcode
            seen["kills" if signum == signal.SIGKILL else "SIGTERM"] += 1
            seen[f"while {where}"] += 1
            seen["temporary files left"] += sum(1 for _ in run.path.rglob(".*.[0-9]*"))
            check_whole(run)
        else:
            assert run.status == "finished" and contents(run) == expected
            seen["runs that ended"] += 1
            seen["starts of these runs"] += run.manifest["starts"]
            if fresh:
                whole = min(whole, time.time() - started)   # seconds that a run takes when nobody disturbs it
            shutil.rmtree(run.path)
    return {**dict(sorted(seen.items())), "seconds": round(time.time() - begin)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--sigterm", type=float, default=0.2, help="share of SIGTERM beside kill -9")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        process = start(Path(tmp) / "alone")
        process.join()
        expected = contents(run_of(Path(tmp) / "alone"))
        for what, n in soak(Path(tmp) / "killed", args.kills, random.Random(args.seed), expected, args.sigterm).items():
            print(f"{what:24} {n}")
    print("every run ended with the same bytes, and no file was ever seen in parts")


if __name__ == "__main__":
    main()

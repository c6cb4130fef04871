"A run that is really killed ends with the same bits as one that was left alone."
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from soak import VALUES, contents, processes, run_of, soak, start

from dt_pretrain.finetuning import finetune
from dt_pretrain.setups import make_config
from dt_pretrain.tasks import InputError


def test_killed_at_30_random_moments(left_alone, tmp_path):
    "kill -9, and SIGTERM in between; `python tests/soak.py --kills 200` is the long form."
    seen = soak(tmp_path, 30, random.Random(1), contents(left_alone), sigterm=0.2)
    print(seen)
    assert seen["kills"] == 30 and seen["while training"] and seen["while writing"]


def until(run, condition, process):
    while not condition(run) and process.is_alive():
        time.sleep(0.002)
    assert process.is_alive()


def test_sigterm_saves_the_middle_of_an_epoch(left_alone, tmp_path):
    process, run = start(tmp_path, values=VALUES | dict(steps_per_epoch=3000)), run_of(tmp_path, VALUES | dict(steps_per_epoch=3000))
    until(run, lambda r: r.last_epoch == 0, process)
    time.sleep(0.3)
    process.terminate()
    process.join()
    stopped = run.path / "resume/stopped.safetensors"
    assert process.exitcode == 143 and stopped.exists() and run.last_epoch == 0
    from dt_pretrain.runs import load_tensors
    tensors, facts = load_tensors(stopped)
    assert facts == dict(epoch=0) and 0 < int(tensors["step"]) == len(tensors["rows"]) < 3000


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_how_it_ended(tmp_path, signum):
    "The installed command, stopped by SIGTERM or Ctrl-C: its exit code, and one line."
    settings = [f"{k}={v}" for k, v in (VALUES | dict(steps_per_epoch=3000)).items()]
    command = [os.path.join(os.path.dirname(sys.executable), "dt-pretrain"), "finetune", "--preset", "smoke", "--device", "cpu", "--runs-dir", tmp_path, "--set", *settings]
    process, run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), run_of(tmp_path, VALUES | dict(steps_per_epoch=3000))
    while run.last_epoch is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signum)
    said = process.communicate()[1]
    assert process.returncode == 143 and (run.path / "resume/stopped.safetensors").exists()
    assert said.splitlines()[-1].endswith("its state is saved; the same command goes on from here") and "Traceback" not in said


def test_second_process_is_told_or_waits(left_alone, tmp_path):
    process, run = start(tmp_path), run_of(tmp_path)
    until(run, lambda r: r.last_epoch is not None, process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(InputError, match="no other process works on"):
            finetune(make_config("smoke", **VALUES), tmp_path, progress=False)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert finetune(make_config("smoke", **VALUES), tmp_path, progress=False, wait=120).manifest["starts"] == 1   # the other one did it
    process.join()
    assert contents(run) == contents(left_alone)


def many(values, runs_dir, queue):
    try:
        finetune(make_config("smoke", **values), runs_dir, device="cpu", progress=False)
        queue.put("did it")
    except InputError as e:
        queue.put(str(e))


def test_of_four_processes_at_once_one_works(left_alone, tmp_path):
    queue = processes.Queue()
    four = [processes.Process(target=many, args=(VALUES, str(tmp_path), queue)) for _ in range(4)]
    for p in four:
        p.start()
    said = sorted(queue.get(timeout=300) for _ in four)
    for p in four:
        p.join()
    assert said[0] == "did it" and all("no other process" in s or s == "did it" for s in said)
    assert run_of(tmp_path).manifest["starts"] == 1 and contents(run_of(tmp_path)) == contents(left_alone)

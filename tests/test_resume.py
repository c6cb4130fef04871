"A run that is really killed ends with the same bits as one that was left alone."
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from dt_pretrain.finetuning import finetune
from dt_pretrain.runs import Run
from dt_pretrain.setups import make_config, run_name
from dt_pretrain.tasks import InputError

VALUES = dict(epochs=4, steps_per_epoch=30, batch_size=8)
SCRIPT = "import sys, torch; torch.set_num_threads(1); from dt_pretrain.finetuning import finetune; from dt_pretrain.setups import make_config; print('ready', flush=True); finetune(make_config('smoke', **{}), sys.argv[1], progress=False)"


def start(runs_dir):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(repr(VALUES)), str(runs_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def contents(run):
    return {p.name: p.read_bytes() for p in run.path.glob("epoch_*.safetensors")}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    import torch
    torch.set_num_threads(1)
    return finetune(make_config("smoke", **VALUES), tmp_path_factory.mktemp("alone"), progress=False)


@pytest.mark.parametrize("kills", [1, 3])
def test_killed_run_ends_the_same(left_alone, tmp_path, kills):
    run, luck = Run(tmp_path / left_alone.path.parent.name / left_alone.path.name), random.Random(kills)
    for _ in range(kills):
        process, epoch = start(tmp_path), run.last_epoch
        while run.last_epoch == epoch and process.poll() is None:   # until it has closed an epoch
            time.sleep(0.002)
        time.sleep(luck.uniform(0, 0.2))                            # and a little into the next
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run.status == "running" and run.last_epoch is not None
    subprocess.run([sys.executable, "-c", SCRIPT.format(repr(VALUES)), str(tmp_path)], check=True, capture_output=True)
    assert run.status == "finished"
    assert contents(run) == contents(left_alone)
    assert run.metrics.equals(left_alone.metrics)


def test_second_process_is_told(tmp_path):
    config = make_config("smoke", **VALUES)
    process, run = start(tmp_path), Run(tmp_path / config.task / run_name(config))
    while run.last_epoch is None and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(InputError, match="no other process works on"):
            finetune(config, tmp_path, progress=False)
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.wait()
    assert run.status == "finished"

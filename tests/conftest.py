"Tests use collected data from the checkout's cache, one thread, and no network."
import os
import shutil
import tempfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
os.environ.setdefault("DT_PRETRAIN_CACHE", str(TOP / ".cache"))   # also for tests that run in a copy
os.environ["HF_HUB_OFFLINE"] = "1"
RUNS = os.environ["DT_PRETRAIN_RUNS"] = tempfile.mkdtemp(prefix="dt_pretrain-runs-")   # never the user's
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"


def pytest_unconfigure():
    shutil.rmtree(RUNS, ignore_errors=True)


@pytest.fixture
def top():
    "The checkout."
    return TOP


@pytest.fixture
def checkout(tmp_path):
    "A copy of the checkout's sources, to change at will."
    copy = tmp_path / "dt_pretrain"
    skip = shutil.ignore_patterns(".*", "_site", "_proc", "_report", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(TOP, copy, ignore=skip, symlinks=True)
    return copy


@pytest.fixture(scope="session")
def left_alone(tmp_path_factory):
    "A run that nobody disturbed."
    from soak import run_of, start
    folder = tmp_path_factory.mktemp("alone")
    start(folder).join()
    assert run_of(folder).status == "finished"
    return run_of(folder)


@pytest.fixture
def cli(capsys):
    "Call `dt-pretrain`; returns its exit code and what it wrote to standard error."
    def run(*args):
        from dt_pretrain.cli import main
        try:
            code = main(list(map(str, args)))
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().err
    return run

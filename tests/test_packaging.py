"Metadata, pins and what a wheel contains."
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from importlib.metadata import distributions, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dt_pretrain.runs import environment


@pytest.fixture
def pins(top):
    lines = (top / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", line) for line in lines)
    return {canonicalize_name(n): v for n, v in (line.split("==") for line in lines)}


def test_every_installed_package_is_pinned(pins):
    site_packages = sysconfig.get_path("purelib")   # not what setuptools carries inside itself
    installed = {canonicalize_name(d.name): d.version.split("+")[0] for d in distributions(path=[site_packages])}
    assert "torch" in installed
    tools = {"pip", "setuptools", "wheel", "dt-pretrain"}
    assert {n: v for n, v in installed.items() if n not in tools and pins.get(n) != v and not n.startswith(("nvidia", "triton", "cuda"))} == {}


def test_pins_satisfy_the_requirements(top, pins):
    parser = ConfigParser(delimiters=["="])
    parser.read(top / "settings.ini")
    settings = parser["DEFAULT"]
    for key in settings:
        if key.endswith("requirements"):
            for r in map(Requirement, settings[key].split()):
                assert r.specifier.contains(pins[canonicalize_name(r.name)]), (key, r)


def test_versions_agree(top):
    import dt_pretrain
    assert dt_pretrain.__version__ == version("dt_pretrain")
    assert f"version: {dt_pretrain.__version__}" in (top / "CITATION.cff").read_text()


def test_wheel_has_modules_and_assets(checkout, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, checkout], check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    here = {str(p.relative_to(checkout)) for p in (checkout / "dt_pretrain").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert here - names == set()
    assert any(n.endswith("hopper-medium-sac.safetensors") for n in names)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_run_names_the_commit_of_our_own_repository_alone(top, tmp_path):
    def git(*args):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def commit():
        said = "from dt_pretrain.runs import environment, __file__ as file; print(environment('cpu')['commit'], file)"
        found, file = subprocess.run([sys.executable, "-c", said], cwd=tmp_path, capture_output=True, text=True, check=True, env=dict(os.environ, PYTHONPATH=str(tmp_path))).stdout.split()
        assert file == str(tmp_path / "dt_pretrain/runs.py")
        return found

    shutil.copytree(top / "dt_pretrain", tmp_path / "dt_pretrain", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    git("init")
    git("commit", "--allow-empty", "-m", "somebody's repository, in which our package lies")
    assert commit() == "None"
    git("add", "dt_pretrain")
    git("commit", "-m", "ours")
    assert commit() == git("rev-parse", "HEAD")
    with (tmp_path / "dt_pretrain/tasks.py").open("a") as f:
        f.write("# edited\n")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_a_run_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment("cpu")["commit"] is None

"The film of the agents: its notebook at the smoke preset, and that what the page says is what the file says."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dt_pretrain.execution import execute_notebook

DRAW = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).close()"
BACKENDS = ["egl", "osmesa"] if sys.platform == "linux" else [""]


@pytest.fixture(scope="module")
def backend():
    "A way to draw without a screen that works here."
    for name in BACKENDS:
        if not subprocess.run([sys.executable, "-c", f"import os; os.environ['MUJOCO_GL'] = {name!r}; {DRAW}"], capture_output=True).returncode:
            return name
    if os.environ.get("CI"):
        pytest.fail("no offscreen renderer, and on CI the film must be made")
    pytest.skip("no offscreen renderer: apt-get install libegl1 libgl1-mesa-dri")


def test_a_film_at_smoke_scale(top, tmp_path, backend, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", backend)
    execute_notebook(top / "nbs/experiments/film.ipynb", tmp_path / "film.ipynb", dict(preset="smoke", runs_dir=str(tmp_path / "runs"), out_dir=str(tmp_path / "out")))
    about = json.loads((tmp_path / "out/film.json").read_text())
    film, still = (Image.open(tmp_path / "out" / about[k]["file"]) for k in ("film", "still"))
    assert film.n_frames == about["film"]["frames"] <= 6 and film.size == still.size == (about["width"], about["height"])
    assert [a["steps"] <= 20 and (tmp_path / "runs" / a["run"]).is_dir() for a in about["agents"]] == [True] * 3
    assert all(f"return {a['return']:.0f}" in about["caption"] for a in about["agents"]) and not list((tmp_path / "out").glob(".*"))
    film.seek(film.n_frames - 1)
    assert film.convert("L").getextrema() != (255, 255)


def test_a_film_of_no_length_is_refused(top, tmp_path):
    with pytest.raises(RuntimeError, match="seconds: expected more than 0"):
        execute_notebook(top / "nbs/experiments/film.ipynb", tmp_path / "film.ipynb", dict(seconds=0.0, out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo needs no choice")
def test_without_a_renderer_the_film_says_what_to_install(top, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "none-such")
    with pytest.raises(RuntimeError, match="offscreen rendering with MUJOCO_GL=none-such: expected EGL .apt-get install libegl1"):
        execute_notebook(top / "nbs/experiments/film.ipynb", tmp_path / "film.ipynb", dict(preset="smoke", out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_film_of_the_home_page_is_light_and_has_its_facts(top):
    folder = top / "nbs/images"
    about = json.loads((folder / "film.json").read_text())
    film, still = (Image.open(folder / about[k]["file"]) for k in ("film", "still"))
    assert Path(film.filename).stat().st_size < 600_000 and Path(still.filename).stat().st_size < 250_000
    assert film.size == still.size == (about["width"], about["height"]) and film.n_frames == about["film"]["frames"] and about["film"]["seconds"] < 8
    assert about["preset"] == "mini" and all(a["median_of"] == 10 and f"return {a['return']:.0f}" in about["caption"] for a in about["agents"])

"""The built wheel in an environment and a folder of its own: models, an epoch of training, a prediction."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import ROOT


@pytest.mark.drawn("as a user types it")
@pytest.mark.slow
def test_the_wheel_trains_and_predicts_in_an_empty_environment(tmp_path: Path) -> None:
    pytest.importorskip("pip")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*install, "--no-index", str(wheel)], check=True, capture_output=True)
    # The wheel's dependencies are those of this environment: nothing is downloaded. Their folder is put on the path
    # without its own .pth files, so an editable installation of the checkout there stays out of sight.
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment = kept | {"JAX_PLATFORMS": "cpu", "FASTVIM_COMPILATION_CACHE": "off"}
    (tmp_path / "work").mkdir()

    def call(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = call(str(python), "-c", "import fastvim_jax; print(fastvim_jax.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    fastvim = str(tmp_path / "env" / "bin" / "fastvim")
    assert "fastvim_tiny_patch16_224" in call(fastvim, "models", "fastvim_tiny*")
    experiment = ("digits/fastvim_digits", "--run-dir", "run", "--epochs", "1", "--no-progress")
    assert "top-1" in call(fastvim, "train", *experiment)
    digit = np.random.default_rng().integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(digit).save(tmp_path / "work" / "digit.png")
    assert "digit.png" in call(fastvim, "predict", "run", "digit.png")

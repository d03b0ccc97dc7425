"""Train a run of a tiny model once for all tests of the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastvim_jax.cli.main import main
from fastvim_jax.data import open_source

# Model, data, optimizer and epochs are those of tests/training/tiny.py, so both share the compiled programs.
EXPERIMENT = '''\
"""A tiny FastVim on the digits, for the tests of the commands."""

from fastvim_jax.data import ClassificationData
from fastvim_jax.models import VisionMambaConfig
from fastvim_jax.training import OptimizerConfig, TrainConfig

config = TrainConfig(
    model=VisionMambaConfig(
        image_size=8, patch_size=4, channels=1, num_classes=10, embed_dim=8, depth=1, state_size=4,
        drop_path=0.3, blocks="unroll",
    ),
    data=ClassificationData(
        source="digits", image_size=8, channels=1, batch_size=128, eval_batch_size=100, crop="pad_shift", pad=1,
        flip=0.0, eval_crop=1.0, mean=(0.3,), std=(0.4,),
    ),
    optimizer=OptimizerConfig(
        learning_rate=2e-3, learning_rate_scaling="none", warmup_epochs=0.5, weight_decay_end=0.4
    ),
    epochs=2,
    ema_decay=0.9,
    log_every_steps=3,
)
'''


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("experiments") / "tiny digits.py"
    file.write_text(EXPERIMENT)
    return file


@pytest.fixture(scope="session")
def run_dir(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run by `fastvim train`, and return its folder."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVIM_COMPILATION_CACHE", "off")
        assert main(["train", str(experiment), "--run-dir", str(folder), "--no-progress"]) == 0
    return folder


@pytest.fixture
def digit_files(tmp_path: Path) -> list[Path]:
    """Write three held-out digits as image files."""
    source = open_source("digits", "test")
    files = []
    for i in range(3):
        files.append(tmp_path / f"digit {i}.png")
        Image.fromarray(source[i].image).save(files[-1])
    return files


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fastvim(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a function that runs the command in this process: exit status, standard output, standard error."""
    monkeypatch.setenv("FASTVIM_COMPILATION_CACHE", "off")
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call

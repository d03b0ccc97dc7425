"""The README's page "Train on your own images", typed as it stands, on a small set and a smaller model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fastvim_jax.training import load_experiment
from tests.cli.conftest import Cli
from tests.support import ROOT

# 2 blocks, 16 wide, 32 px, 2 epochs: what a test can wait for.
REDUCED = (
    "--model.depth 2 --model.embed-dim 16 --model.image-size 32 --data.image-size 32 --epochs 2 "
    "--optimizer.warmup-epochs 1 --data.batch-size 16 --no-progress"
).split()


def _commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    page = text.split("## Train on your own images\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def my_images(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Squares, discs and stripes: 12 of each to train on, 4 to evaluate, JPEG and PNG of several sizes."""
    for split, count in (("train", 12), ("val", 4)):
        for kind in ("disc", "square", "stripes"):
            folder = tmp_path / "my_images" / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = (int(v) for v in rng.integers(50, 80, 2))
                image = Image.new("RGB", (width, height), tuple(rng.integers(0, 90, 3).tolist()))
                draw, colour = ImageDraw.Draw(image), tuple(rng.integers(150, 256, 3).tolist())
                if kind == "disc":
                    draw.ellipse((10, 10, 40, 40), fill=colour)
                elif kind == "square":
                    draw.rectangle((10, 10, 40, 40), fill=colour)
                else:
                    for x in range(0, width, 8):
                        draw.line((x, 0, x, height), fill=colour, width=3)
                image.save(folder / f"{i}.{'png' if i % 4 == 0 else 'jpg'}")
    Image.open(tmp_path / "my_images/val/disc/1.jpg").save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.slow
def test_the_page_works_as_typed(
    fastvim: Cli, my_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(my_images)
    outputs: dict[str, str] = {}
    for program, *arguments in _commands():
        assert program == "fastvim"
        extra = REDUCED if arguments[0] == "train" else []
        status, out, err = fastvim(*arguments, *extra)
        assert status == 0, (arguments, out, err)
        name = " ".join(arguments[:2])
        outputs.setdefault(name, out)
    assert "Nothing is wrong." in outputs["data check"]
    assert "--data.path my_images --model.num-classes 3" in outputs["data check"]
    assert "on the 12 images" in outputs["eval runs/my_images"]
    assert (my_images / "confusion.png").is_file()
    first = outputs["predict runs/my_images"].splitlines()
    assert first[0] == "photo.jpg" and {line.split()[-1] for line in first[1:]} == {
        "disc", "square", "stripes",
    }  # fmt: skip
    assert (my_images / "runs/my_shards/summary.png").is_file()


def test_the_page_names_the_steps_in_order() -> None:
    steps = [" ".join(arguments[:1]) for _, *arguments in _commands()]
    assert steps == ["data", "train", "eval", "predict", "data", "train"]


def test_wrong_class_counts_and_folders_are_answered(
    fastvim: Cli, my_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(my_images)
    config = load_experiment("your_images/fastvim")
    assert (config.data.path, config.data.eval_split) == ("my_images", "val")
    train = ("train", "your_images/fastvim", "--no-progress", "--run-dir", "runs/x")
    status, _, err = fastvim(*train)
    assert status == 1 and "has 3 classes: set model.num_classes=3" in err
    status, _, err = fastvim(*train, "--data.path", "elsewhere")
    assert status == 1 and "'elsewhere' does not exist (data.path)" in err
    assert not (my_images / "runs").exists()

"""The page "Train on your own images", typed as it stands, on a small set and a smaller model."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw

from fastvim_jax.models import build_model, model_config
from fastvim_jax.models.saving import save_pretrained
from fastvim_jax.training import load_experiment
from tests.cli.conftest import Cli
from tests.support import ROOT

# 1 block, 16 wide, 32 px, 2 epochs: what a test can wait for.
REDUCED = (
    "--model.depth 1 --model.embed-dim 16 --model.image-size 32 --data.image-size 32 --epochs 2 "
    "--optimizer.warmup-epochs 1 --data.batch-size 16 --no-progress"
).split()


def _commands() -> list[list[str]]:
    text = (ROOT / "docs" / "your_images.md").read_text()
    page = text.split("## Train on your own images\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def my_images(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Draw squares, discs and stripes: 12 of each to train on, 4 to evaluate, JPEG and PNG of several sizes."""
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


@pytest.mark.drawn("as a user types it")
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
    assert "on 12 images of" in outputs["eval runs/my_images"]
    assert (my_images / "confusion.png").is_file()
    first = outputs["predict runs/my_images"].splitlines()
    assert first[0] == "photo.jpg" and {line.split()[-1] for line in first[1:]} == {
        "disc", "square", "stripes",
    }  # fmt: skip
    assert (my_images / "runs/my_shards/summary.png").is_file()


def test_the_page_names_the_steps_in_order() -> None:
    steps = [" ".join(arguments[:1]) for _, *arguments in _commands()]
    assert steps == ["data", "train", "eval", "predict", "data", "train"]


def test_the_page_fine_tunes_the_model_whose_weights_it_names() -> None:
    """Build the model that the page's options describe: it has the parameters of FastVim-T with three classes."""
    text = (ROOT / "docs" / "your_images.md").read_text().split("FastVim-T at 224 px:")[1]
    options = re.findall(r"--model\.([a-z-]+) (\d+)", text.split("```")[1])
    changes = {name.replace("-", "_"): int(value) for name, value in options}
    described = dataclasses.replace(load_experiment("your_images/fastvim").model, **changes)
    named = model_config("fastvim_tiny_patch16_224", num_classes=3)
    shapes = [
        nnx.state(nnx.eval_shape(lambda config=config: build_model(config, rngs=nnx.Rngs(0))))
        for config in (described, named)
    ]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])


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


@pytest.mark.drawn("commands", one_in=6)
def test_a_new_set_of_classes_starts_from_another_model_s_weights(
    fastvim: Cli, my_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start a run with three classes from one with five, then use it from another folder, and on a folder of images."""
    monkeypatch.chdir(my_images)
    config = load_experiment("your_images/fastvim").model
    small = dataclasses.replace(config, image_size=32, embed_dim=16, depth=1, num_classes=5)
    save_pretrained(build_model(small, rngs=nnx.Rngs(0)), "five_classes")
    train = (
        "train your_images/fastvim --data.path my_images --run-dir runs/tuned --epochs 1".split()
    )
    train += (
        "--model.depth 1 --model.embed-dim 16 --model.image-size 32 --data.image-size 32".split()
    )
    train += ["--data.batch-size", "16"]
    status, _, err = fastvim(*train, "--model.num-classes", "3", "--init", "five_classes")
    assert status == 0, err
    assert (
        "Starting from five_classes:" in err
        and "drawn       2  head.* (5 classes there, 3 here)" in err
    ), err
    table = json.loads(Path("runs/tuned/init.json").read_text())
    assert table["parameters"]["head.bias"] == "drawn 5 classes there, 3 here"
    assert table["parameters"]["blocks.0.mixer.forward.D"] == "taken"

    (my_images / "elsewhere").mkdir()
    monkeypatch.chdir(my_images / "elsewhere")
    status, out, err = fastvim("eval", "../runs/tuned", "--json")
    assert status == 0 and json.loads(out)["scores"]["raw"]["count"] == 12, err
    status, out, err = fastvim("predict", "../runs/tuned", "../my_images/val/disc", "../photo.jpg")
    files = [line for line in out.splitlines() if not line.startswith(" ")]
    assert status == 0 and files == [
        *(f"../my_images/val/disc/{i}.{'png' if i % 4 == 0 else 'jpg'}" for i in range(4)),
        "../photo.jpg",
    ]
    status, _, err = fastvim("predict", "../runs/tuned", ".")
    assert status == 2 and ". holds no image file" in err
    status, _, err = fastvim(
        "train", "your_images/fastvim", "--data.path", "../my_images", "--run-dir", "../runs/tuned",
        "--model.num-classes", "3", *REDUCED,
    )  # fmt: skip
    assert status == 1 and "--init ../runs/tuned --run-dir NEW" in err

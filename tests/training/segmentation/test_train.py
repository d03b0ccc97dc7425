"""A few steps of a real run: it learns, resumes to the same bits, evaluates and draws."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.cli.main import main
from fastvim_jax.data.segmentation import open_masks
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.data.sources.mask_folder import MaskFolderSource
from fastvim_jax.errors import UserError
from fastvim_jax.training import load_run, read_metrics, train
from tests.support import checked, data_dir
from tests.training.compare_runs import assert_same_run
from tests.training.segmentation.tiny import draw_scenes, tiny_config


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    draw_scenes(root, np.random.default_rng(0))
    return root


@pytest.fixture(scope="module")
def config(scenes):
    """Return the tiny run, on the real ADE20K samples where they are; four steps on either."""
    drawn = tiny_config(scenes)
    if data_dir() is None:
        return drawn
    data = dataclasses.replace(
        drawn.data,
        path=str(data_dir() / "ade20k_samples"),
        train_split="validation",
        zero_is_ignored=True,
    )
    model = dataclasses.replace(drawn.model, num_classes=150)
    return dataclasses.replace(drawn, data=data, model=model, epochs=4)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(config, folder, progress=False)


def test_a_run_ends_with_scores_a_picture_and_a_table(config, finished):
    folder, result = finished
    source = open_masks(config.data, "validation")
    assert result.step == 4 and "mIoU" in result.headline
    assert 0 <= result.metrics["raw_miou"] <= 1 and result.metrics["count"] == len(source)
    losses = [record["loss"] for record in read_metrics(folder, "train")]
    assert np.isfinite(losses).all() and len(losses) == 4
    with Image.open(folder / "segmentation.png") as picture:
        assert picture.size[0] > 900
    table = (folder / "class_scores.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == list(source.class_names)
    assert json.loads((folder / "classes.json").read_text()) == list(source.class_names)


def test_a_run_goes_on_from_an_earlier_checkpoint_to_the_same_bits(
    config, finished, tmp_path, capsys, monkeypatch
):
    """Resume from an earlier checkpoint; that any interruption leaves such a folder is tested with the classifier."""
    resumed = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(resumed / "checkpoints" / "4")
    monkeypatch.setattr(SegmentationData, "notes", ("A note on the settings.",))
    monkeypatch.setattr(MaskFolderSource, "notes", ("A note on the files.",))
    train(config, resumed)
    assert_same_run(resumed, finished[0])
    shown = capsys.readouterr().err
    assert "A note on the settings." in shown and "A note on the files." in shown


@pytest.mark.drawn("trainings", one_in=6)
def test_a_run_is_evaluated_and_drawn_from_the_command_line(config, finished, tmp_path, capsys):
    folder, result = finished
    assert main(["eval", str(folder), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["miou"] == result.metrics["raw_miou"]
    assert scores["count"] == result.metrics["count"]
    assert main(["eval", str(folder), "--per-class"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["IoU", "accuracy", "class"]
    assert len(lines) == 2 + config.model.num_classes
    image = sorted((Path(config.data.path) / "images/validation").iterdir())[0]
    wrong = tmp_path / "no_image.jpg"
    wrong.write_bytes(b"text")
    drawn = ["predict", str(folder), str(image), str(wrong), "--out", str(tmp_path / "drawn")]
    assert main(drawn) == 1
    captured = capsys.readouterr()
    masked = f"{image.stem}_mask.png"
    assert masked in captured.out and "no_image.jpg" in captured.err
    shift = int(config.data.zero_is_ignored)  # Masks hold the labels of the training masks.
    with Image.open(tmp_path / "drawn" / masked) as mask, Image.open(image) as pixels:
        assert mask.size == pixels.size
        assert (
            shift
            <= np.asarray(mask).min()
            <= np.asarray(mask).max()
            < config.model.num_classes + shift
        )
    assert main(drawn[:-2]) == 2 and "--out" in capsys.readouterr().err


def test_running_statistics_are_part_of_the_run(finished):
    model = load_run(finished[0]).model
    assert np.abs(np.asarray(model.decode_head.fusion.norm.mean[...])).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 0.9}, "ema_decay"),
        ({"loss_divisor": "some"}, "loss_divisor"),
        ({"accumulate": 2}, "two images"),
        ({"pictures": -1}, "pictures"),
    ],
)
def test_an_impossible_config_is_refused(scenes, changes, message):
    with pytest.raises(UserError, match=message):
        checked(tiny_config(scenes), **changes)


def test_another_number_of_classes_is_refused(scenes, tmp_path):
    config = tiny_config(scenes)
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=5))
    with pytest.raises(UserError, match=r"set model\.num_classes=3"):
        train(wrong, tmp_path / "run", progress=False)

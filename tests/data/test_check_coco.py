"""`fastvim data check` of COCO files: what is wrong, their splits and layouts, and the command that trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvim_jax.cli import check_coco
from fastvim_jax.cli.main import main
from fastvim_jax.data.detection import (
    open_coco,
)
from fastvim_jax.data.sources.coco import CocoSource
from fastvim_jax.errors import UserError
from tests.data.test_detection import HEIGHT, WIDTH, box, config, write

pytest.importorskip("pycocotools.mask")


def test_a_scan_lists_what_is_wrong(tmp_path: Path, capsys) -> None:
    root = write(
        tmp_path,
        [
            box(4, 4, 20, 10),
            box(30, 4, 20, 10, segmentation=[[1, 2, 3, 4]]),
            box(50, 4, 30, 10),
            box(4, 4, 0, 10),
            box(4, 4, 9, 9, segmentation={"size": [HEIGHT, WIDTH], "counts": "broken"}),
        ],
        images=3,
    )
    (root / "train/1.png").unlink()
    (root / "train/2.png").write_bytes(b"no image")
    assert check_coco.run([str(root), "--split", "train", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)["train"]
    kinds = sorted(problem["kind"] for problem in report["problems"])
    assert kinds == [
        "box that leaves the image",
        "box without area",
        "mask that cannot be read",
        "missing",
        "polygon of fewer than three points",
        "unreadable",
    ]
    assert report["objects"] == {"cat": 0, "dog": 4}
    assert any("3 gaps" in note for note in report["notes"])
    assert "1 category has no object, of 2: cat." in report["notes"]


def test_the_scan_finds_the_splits_and_says_how_to_train(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    """Name splits by the files of annotations, and give a command that trains on them."""
    root = write(tmp_path, [box(4, 4, 20, 10)], images=1)
    assert main(["data", "check", str(root)]) == 0
    told = capsys.readouterr().out
    assert "train: 1 image" in told
    splits = "--data.train-split train --data.eval-split train"
    assert f"train coco/fastvim_tiny --data.path {root} --model.num-classes 2 {splits} (" in told
    monkeypatch.chdir(root)
    for pattern in ("annotations/instances_{split}.json", "./annotations//instances_{split}.json"):
        assert main(["data", "check-coco", ".", "--annotations", pattern]) == 0
        assert "train: 1 image" in capsys.readouterr().out
    (root / "train").rename(root / "val_small")
    (root / "annotations/instances_train.json").rename(root / "annotations/val_small.json")
    patterns = ["--annotations", "annotations/{split}.json"]
    assert main(["data", "check-coco", str(root), *patterns]) == 0
    told = capsys.readouterr().out
    assert (
        "val_small: 1 image" in told and "--data.annotations 'annotations/{split}.json' (" in told
    )
    assert main(["data", "check-coco", str(root)]) != 0
    assert "instances_{split}.json': correct --annotations" in capsys.readouterr().err


def test_a_folder_as_roboflow_writes_it_is_checked(tmp_path: Path, capsys) -> None:
    root = write(tmp_path, [box(4, 4, 20, 10)], images=1)
    file = root / "annotations/instances_train.json"
    file.rename(root / "train/_annotations.coco.json")
    file.parent.rmdir()
    assert main(["data", "check", str(root)]) == 0
    told = capsys.readouterr().out
    assert "train: 1 image" in told
    assert "--data.annotations '{split}/_annotations.coco.json' (" in told
    (root / "train/_annotations.coco.json").rename(root / "all.json")
    (root / "train/0.png").rename(root / "0.png")
    assert main(["data", "check", str(root)]) != 0
    assert "`check-coco` take patterns" in capsys.readouterr().err


def test_images_with_absolute_names_are_missing(tmp_path: Path) -> None:
    """Say so at the start: they are read below the folder of the images, as links out of it are not followed."""
    root = write(tmp_path, [box(4, 4, 20, 10)], images=1)
    file = root / "annotations/instances_train.json"
    file.write_text(file.read_text().replace('"0.png"', f'"{root}/train/0.png"'))
    with pytest.raises(UserError, match="of 1 image .* 1 cannot be found"):
        open_coco(config(root), "train")


def test_categories_of_one_name_stay_apart(tmp_path: Path, capsys) -> None:
    """Use the ids where a name stands for several categories, as exporters write a parent beside its only child."""
    names = {0: "fish", 1: "fish", 2: "fish (id 1)", 3: "crab"}
    categories = [{"id": i, "name": name} for i, name in names.items()]
    root = write(
        tmp_path, [box(4, 4, 20, 10, category_id=1)] * 2 + [box(4, 4, 20, 10, category_id=3)], 1,
        categories=categories,
    )  # fmt: skip
    source = CocoSource(root, "train")
    assert len(set(source.class_names)) == 4
    assert source.class_names[0] == "fish (id 0)" and source.class_names[3] == "crab"
    assert check_coco.run([str(root), "--split", "train", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["train"]
    assert list(report["objects"].values()) == [0, 2, 0, 1]
    assert (
        "1 name stands for several categories, which are told apart by their ids: fish (2)."
        in report["notes"]
    )

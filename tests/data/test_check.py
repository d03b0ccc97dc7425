"""A scan names every kind of thing that is wrong, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import (
    ClassificationData,
    make_eval_iterator,
    make_train_iterator,
    open_source,
)
from fastvim_jax.data.prepare.advice import BATCH_SIZE, training_advice
from fastvim_jax.data.prepare.check import check
from fastvim_jax.data.records import Record
from fastvim_jax.errors import UserError
from tests.data.test_sources import _pack


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_wrong_is_listed(
    image_tree: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvim_jax.data.prepare.check._CHUNK", 8)
    ant, bee = image_tree / "train" / "ant", image_tree / "train" / "bee"
    (ant / "04.png").write_bytes((ant / "04.png").read_bytes()[:50])
    (ant / "05.png").write_bytes(b"")
    (ant / "07.png").write_bytes((ant / "08.png").read_bytes())  # the same twice: no problem
    (bee / "03.png").write_bytes((ant / "09.png").read_bytes())
    source = open_source("image_folder", "train", path=str(image_tree))
    (bee / "06.png").unlink()
    calls: list[int] = []
    report = check(source, workers=workers, progress=lambda done, total: calls.append(done))
    assert calls[-1] == report.records == 30 and len(calls) == 4
    assert report.counts == {0: 23, 1: 6} and report.duplicates == 1
    assert [(p.kind, p.index) for p in report.problems] == [
        ("undecodable", 4), ("undecodable", 5), ("undecodable", 29), ("conflict", 9), ("empty class", None),
    ]  # fmt: skip
    messages = [p.message for p in report.problems]
    assert "ant/04.png: damaged" in messages[0] and "05.png: the file is empty" in messages[1]
    assert "bee/06.png: No such file" in messages[2]
    assert f"{ant / '09.png'} as ant; {bee / '03.png'} as bee" in messages[3]
    assert messages[4] == "class 2 (cat) has no record."


def test_labels_outside_the_classes_are_listed(tmp_path: Path, rng: np.random.Generator) -> None:
    digits = open_source("digits", "test")
    from fastvim_jax.data.prepare.encoding import encoded

    images = [encoded(digits[i], None) for i in range(4)]
    _pack(tmp_path / "train.npz", images, [0, 3, 1, 7])
    (tmp_path / "classes.txt").write_text("zero\none\n")
    source = open_source("packed_npz", "train", path=str(tmp_path), any_label=True)
    report = check(source)
    assert [(p.kind, p.index) for p in report.problems] == [("label", 1), ("label", 3)]
    assert "train.npz[3]: label 7, outside the 2 classes" in report.problems[1].message
    assert not check(digits).problems


def test_images_that_all_look_the_same_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    """Name images that all look the same, such as drawings whose shapes stand in the transparency only."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(3):
        layered = np.full((12, 12, 4), 255, np.uint8)
        layered[..., 3] = rng.integers(0, 256, (12, 12))
        Image.fromarray(layered).save(tmp_path / "train" / "a" / f"{i}.png")
    report = check(open_source("image_folder", "train", path=str(tmp_path)))
    assert [p.kind for p in report.problems] == ["alike"]
    assert "all 3 images look the same" in report.problems[0].message


def test_images_of_many_channels_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(3):
        np.save(folder / f"{i}.npy", rng.integers(0, 60000, (9, 7, 5)).astype(np.uint16))
    source = open_source("image_folder", "train", path=str(tmp_path))
    report = check(source)
    assert not report.problems and report.channels == 5
    named = NamedChannels([rng.integers(0, 255, (9, 7, n)).astype(np.uint8) for n in (2, 2, 3)])
    report = check(named)
    assert [p.message for p in report.problems] == [
        "field 2: 3 channels, but the data set names 2."
    ]
    np.save(folder / "2.npy", np.zeros((9, 7, 2), np.uint8))
    (folder / "1.npy").write_bytes(b"\x93NUMPY damaged")
    kinds = [problem.kind for problem in check(source).problems]
    assert kinds == ["undecodable", "channels"]


class NamedChannels:
    """Fields whose source names two channels, as shards of a plate do."""

    class_names, channel_names = ("a",), ("x", "y")

    def __init__(self, images: list[np.ndarray]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], 0, f"field {index}")


def test_damaged_metadata_are_counted(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i, exif in enumerate((b"", b"garbage!", Image.Exif().tobytes())):
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "a" / f"{i}.png", exif=exif)
    report = check(open_source("image_folder", "train", path=str(tmp_path)))
    assert report.damaged_metadata == 1 and not report.problems


def _start(path: Path, options: dict[str, str]) -> tuple[int, int]:
    """Open the data as the options of an advice say; return the numbers of records of both splits."""
    given: dict[str, Any] = {
        name.removeprefix("data.").replace("-", "_"): value
        for name, value in options.items()
        if name.startswith("data.")
    }
    for name in ("batch_size", "max_corrupt"):
        if name in given:
            given[name] = int(given[name])
    merged: dict[str, Any] = {"batch_size": BATCH_SIZE, "eval_split": "val", **given}
    config = ClassificationData(source="image_folder", path=str(path), image_size=8, **merged)
    train, held_out = make_train_iterator(config, seed=0), make_eval_iterator(config)
    assert train.source.class_names == held_out.source.class_names
    assert int(options["model.num-classes"]) == len(train.source.class_names)
    for _ in range(2 * train.steps_per_epoch):
        next(train)
    assert sum(int(batch["valid"].sum()) for batch in held_out)
    train.close()
    held_out.close()
    return len(train.source), len(held_out.source)


@pytest.mark.parametrize("case", ["no held-out split", "only images", "damaged", "two splits"])
def test_the_advice_starts_a_training(case: str, image_tree: Path) -> None:
    test = image_tree / "test"
    expected = (30, 6)
    if case != "two splits":
        shutil.rmtree(test)
        expected = (23, 7)  # every fifth of 23 and of 7 is held out
    if case == "only images":
        (image_tree / "train").rename(image_tree / "pictures")
    if case == "damaged":
        (image_tree / "train" / "bee" / "01.png").write_bytes(b"damaged")
    splits = [folder.name for folder in sorted(image_tree.iterdir()) if folder.is_dir()]
    reports = {
        name: check(open_source("image_folder", name, path=str(image_tree))) for name in splits
    }
    advice = training_advice(reports)
    assert not advice.refused
    assert advice.options.get("data.max-corrupt") == ("1" if case == "damaged" else None)
    assert _start(image_tree, advice.options) == expected


def test_what_training_refuses_is_said(tmp_path: Path) -> None:
    for split, labels in (("train", [0, 1, 0]), ("val", [0, 3, 1])):
        _pack(tmp_path / f"{split}.npz", [b"x"] * 3, labels)
    names = ("train", "val")
    source = {n: open_source("packed_npz", n, path=str(tmp_path), any_label=True) for n in names}
    advice = training_advice({name: check(source[name]) for name in names})
    assert any("train has 2 classes, val 4" in line for line in advice.refused)
    assert any("val has 3 records, 3 of them undecodable" in line for line in advice.refused)


@pytest.mark.parametrize(("number", "count"), [(1, 5), (2, 5), (5, 5), (1, 2)])
def test_stratified_parts_are_disjoint_and_keep_shares(
    number: int, count: int, image_tree: Path
) -> None:
    def names(split: str) -> dict[str, int]:
        source = open_source("image_folder", split, path=str(image_tree))
        return {source[i].name: source[i].target for i in range(len(source))}

    part, rest = names(f"train[{number}/{count}]"), names(f"train[-{number}/{count}]")
    assert not part.keys() & rest.keys() and part | rest == names("train")
    for label, whole in ((0, 23), (1, 7)):
        assert abs(list(part.values()).count(label) - whole / count) < 1
    for bad in ("train[0/5]", "train[6/5]", "train[1/1]"):
        with pytest.raises(UserError, match=r"no such part"):
            names(bad)

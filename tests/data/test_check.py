"""A scan names every kind of thing that is wrong, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastvim_jax.data import open_source
from fastvim_jax.data.prepare.check import check
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
    from fastvim_jax.data.prepare.shards import encoded

    images = [encoded(digits[i], None) for i in range(4)]
    _pack(tmp_path / "train.npz", images, [0, 3, 1, 7])
    (tmp_path / "classes.txt").write_text("zero\none\n")
    source = open_source("packed_npz", "train", path=str(tmp_path), any_label=True)
    report = check(source)
    assert [(p.kind, p.index) for p in report.problems] == [("label", 1), ("label", 3)]
    assert "train.npz[3]: label 7, but there are 2 classes" in report.problems[1].message
    assert not check(digits).problems

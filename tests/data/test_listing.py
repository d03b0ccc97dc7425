"""Large listings go to other processes as files that these map into memory, and the files go with their process."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvim_jax.data import listing, open_source
from fastvim_jax.data.listing import FiledSequence, SharedArray, Texts, listing_by
from fastvim_jax.data.sources.coco import CocoSource
from fastvim_jax.data.sources.coco_file import Objects
from fastvim_jax.data.sources.mask_folder import MaskFolderSource
from fastvim_jax.errors import UserError
from tests.support import ROOT


def test_texts_are_a_sequence(rng: np.random.Generator) -> None:
    names = ["", "a", "ü/ß.png", os.fsdecode(b"\xff\xfe.png"), "long" * 50]
    texts = Texts(names)
    assert list(texts) == names and len(texts) == 5 and texts[-1] == names[-1]
    assert texts[1:3] == names[1:3] and names[2] in texts
    assert list(pickle.loads(pickle.dumps(texts))) == names
    assert not list(Texts([]))
    with pytest.raises(IndexError):
        _ = texts[5]


def test_large_arrays_are_mapped_and_small_ones_sent(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = rng.integers(0, 100, (4000, 3))
    shared = SharedArray(values)
    assert len(pickle.dumps(shared)) > values.nbytes
    monkeypatch.setattr(listing, "SHARED_FROM", 1000)
    pickled = pickle.dumps(shared)
    assert len(pickled) < 500 and pickle.dumps(shared) == pickled  # one file, however many workers
    copy = pickle.loads(pickled)
    assert isinstance(copy.values, np.memmap) and not copy.values.flags.writeable
    np.testing.assert_array_equal(copy.values, values)


def test_sources_are_small_when_pickled(image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("image_folder", "train", path=str(image_tree))
    monkeypatch.setattr(listing, "SHARED_FROM", 1)
    copy = pickle.loads(pickle.dumps(source))
    for i in range(len(source)):
        assert (copy[i].name, copy[i].target) == (source[i].name, source[i].target)


def pack_shards(folder: Path, rng: np.random.Generator) -> None:
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for i in range(3):
            for name, data in ((f"{i}.png", rng.bytes(9)), (f"{i}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["image_folder", "webdataset"])
def test_one_process_lists_for_the_others(
    kind: str, image_tree: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open a second source as another process does: with the first one's listing, and without reading a name."""
    pack_shards(image_tree, rng)
    made: list[Any] = []

    def first(make: Callable[[], Any]) -> Any:
        made.append(make())
        return made[0]

    with listing_by(first):
        expected = open_source(kind, "train", path=str(image_tree))
    assert len(made) == 1

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("lists again")

    monkeypatch.setattr("fastvim_jax.data.sources.image_folder.walk", refuse)
    monkeypatch.setattr("fastvim_jax.data.sources.webdataset.tarfile.open", refuse)
    with listing_by(lambda make: made[0]):
        found = open_source(kind, "train", path=str(image_tree))
    assert len(found) == len(expected) > 0
    for i in range(len(found)):
        assert found[i] == expected[i]
    with pytest.raises(UserError, match="lists again"):
        open_source(kind, "train", path=str(image_tree))


def dense_sets(root: Path, rng: np.random.Generator) -> dict[str, Callable[[], Any]]:
    """Write a folder of masks and a set in COCO's format; return what opens them."""
    for folder, ending in (("images/train", "jpg"), ("annotations/train", "png")):
        (root / folder).mkdir(parents=True)
        for i in range(3):
            (root / folder / f"{i}.{ending}").write_bytes(rng.bytes(9))
    shapes = [None, [[1.1, 2, 3, 4, 5, 6]], {"size": [9, 8], "counts": "X2"}]
    content = {
        "images": [
            {"id": i + 5, "file_name": f"{i}.jpg", "width": 8, "height": 9} for i in range(3)
        ],
        "annotations": [
            {
                "image_id": 5 + j // 2,
                "category_id": 4,
                "bbox": [j, 1, 2, 2.5],
                "segmentation": shape,
            }
            for j, shape in enumerate(shapes)
        ],
        "categories": [{"id": 4, "name": "é"}],
    }
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return {
        "mask_folder": lambda: MaskFolderSource(root, "train", class_names=("a", "b")),
        "coco": lambda: CocoSource(root, "train", images="images/{split}"),
    }


def plain(target: Any) -> Any:
    return vars(target) if isinstance(target, Objects) else target


@pytest.mark.parametrize("kind", ["mask_folder", "coco"])
def test_dense_sets_are_listed_once_and_small_when_pickled(
    kind: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = dense_sets(tmp_path, rng)[kind]
    made: list[Any] = []

    def first(make: Callable[[], Any]) -> Any:
        made.append(make())
        return made[0]

    with listing_by(first):
        expected = opened()
    monkeypatch.setattr("fastvim_jax.data.sources.mask_folder._find", None)
    monkeypatch.setattr("fastvim_jax.data.sources.coco.pack_records", None)
    with listing_by(lambda make: made[0]):
        found = opened()
    monkeypatch.setattr(listing, "SHARED_FROM", 1)
    copy = pickle.loads(pickle.dumps(found))
    assert len(copy) == len(found) == len(expected) == 3
    for i in range(3):
        for one, other in ((found[i], expected[i]), (copy[i], expected[i])):
            assert (one.name, one.image) == (other.name, other.image)
            np.testing.assert_equal(plain(one.target), plain(other.target))
    if kind == "coco":
        assert found.image_ids == (5, 6, 7) and found.class_names == ("é",)
        assert [len(found.objects(i).labels) for i in range(3)] == [2, 1, 0]
        # 9 x 8 is the size of the RLE's image, so both kinds of mask and none come back as they were.
        assert [found.objects(i).shapes for i in range(2)] == [
            (None, [[1.1, 2, 3, 4, 5, 6]]),
            ({"size": [9, 8], "counts": "X2"},),
        ]
        np.testing.assert_array_equal(found.objects(0).boxes, [[0, 1, 2, 3.5], [1, 1, 3, 3.5]])
        assert found.truth("bbox") == expected.truth("bbox")


def test_a_sequence_of_any_size_is_small_when_pickled(rng: np.random.Generator) -> None:
    values = [rng.normal(size=10_000) for _ in range(3)]
    pickled = pickle.dumps(FiledSequence(values))
    assert len(pickled) < 500
    copy = pickle.loads(pickled)
    assert len(copy) == 3 and pickle.dumps(copy) == pickled
    np.testing.assert_array_equal(copy[2], values[2])


SCRIPT = """
import os, pickle, signal, sys
import numpy as np
from fastvim_jax.data.listing import SharedArray
pickle.dumps(SharedArray(np.zeros(2**20, np.uint8)))
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_go_with_their_process(tmp_path: Path) -> None:
    """Delete a process's listing files at its end, or when the next process makes such a file."""
    for how, left in (("ended", 0), ("killed", 1), ("ended", 0)):
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", SCRIPT, how], cwd=ROOT, env=environment)
        assert len(list(tmp_path.glob("fastvim-listing-*"))) == left


def test_files_of_another_machine_stay(tmp_path: Path) -> None:
    """Leave the files of machines that share the folder alone: their processes are not seen from here."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SCRIPT, "killed"], cwd=ROOT, env=environment)
    (folder,) = tmp_path.glob("fastvim-listing-*")
    random = folder.name.rpartition("-")[2]
    other = folder.rename(folder.with_name(f"fastvim-listing-{'f' * 12}-999999999-{random}"))
    subprocess.run([sys.executable, "-c", SCRIPT, "ended"], cwd=ROOT, env=environment)
    assert list(tmp_path.glob("fastvim-listing-*")) == [other]

"""Tar shards: every image at random, labels from either kind of file, and errors that name the shard."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, DecodeError, make_eval_iterator, open_source
from fastvim_jax.data.fingerprint import fingerprint
from fastvim_jax.data.sources.layout import list_splits
from fastvim_jax.errors import UserError
from tests.data.conftest import encode


def _shard(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, list[bytes], list[int]]:
    """Write three training shards of 5, 1 and 3 images, and a test shard."""
    images, labels = [], []
    for number, count in enumerate((5, 1, 3)):
        members: dict[str, bytes] = {}
        for i in range(count):
            pixels = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            images.append(encode(Image.fromarray(pixels), "PNG"))
            labels.append(int(rng.integers(0, 4)))
            key = f"v1.0/{number}{i:03}"
            label = {".cls": str(labels[-1]), ".json": json.dumps({"label": labels[-1], "x": 1})}
            extension = ".cls" if i % 2 else ".json"
            # The label may come before its image.
            members[key + extension] = label[extension].encode()
            members[key + ".png"] = images[-1]
            members[key + ".txt"] = b"a caption"
        _shard(tmp_path / f"train-{number:06}.tar", members)
    _shard(tmp_path / "test-000000.tar", {"a.PNG": images[0], "a.cls": b"3\n"})
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    return tmp_path, images, labels


def test_every_image_is_there_with_its_label(shards: tuple[Path, list[bytes], list[int]]) -> None:
    root, images, labels = shards
    source = open_source("webdataset", "train", path=str(root))
    assert source.class_names == ("ant", "bee", "cat", "dog")
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert [copy[i].image for i in range(len(copy))] == images
        assert [copy[i].target for i in range(9)] == labels
    assert source[5].name == f"{root / 'train-000001.tar'}/v1.0/1000.png"
    assert source[8].image == images[8]  # any order
    assert source.labels.tolist() == labels
    test = open_source("webdataset", "test", path=str(root))
    assert (len(test), test[0].target, test[0].image) == (1, 3, images[0])


def test_a_stamp_tells_a_mended_label(shards: tuple[Path, list[bytes], list[int]]) -> None:
    root, images, _ = shards
    found = []
    for label in (b"1", b"2"):
        _shard(root / "val-0.tar", {"a.png": images[0], "a.cls": label})
        os.utime(root / "val-0.tar", ns=(7, 7))  # Even if the time of change were the same.
        source = open_source("webdataset", "val", path=str(root))
        found.append(fingerprint(source, 0, 1))
        assert fingerprint(pickle.loads(pickle.dumps(source)), 0, 1) == found[-1]
    os.utime(root / "val-0.tar", ns=(7, 8))
    assert len({*found, fingerprint(source, 0, 1)}) == 3


def test_a_split_is_its_own_shards_only(
    shards: tuple[Path, list[bytes], list[int]], tmp_path: Path
) -> None:
    _, images, _ = shards
    root = tmp_path / "named"
    root.mkdir()
    names = {
        "train": ("train", "train-0000", "train_001", "train-00002-of-00010", "train.3", "train04"),
        "train-extra": ("train-extra-0000",),
        "trained": ("trained-0",),
        "val": ("val-0000-of-0002", "val-0001-of-0002"),
        "validation": ("validation-0000",),
        "proof": ("proof-7",),
        "v[1]x": ("v[1]x-0",),
        "fold": ("fold1", "fold10-0", "fold10-1"),
    }
    for files in names.values():
        for name in files:
            _shard(root / f"{name}.tar", {"a.png": images[0], "a.cls": b"0"})
    assert list_splits("webdataset", str(root)) == sorted(names)
    for split, files in names.items():
        source = open_source("webdataset", split, path=str(root))
        found = {Path(source[i].name).parent.stem for i in range(len(source))}
        assert found == set(files) and len(source) == len(files)
    for split, count in {"fold1": 1, "fold10": 2, "fold10-1": 1, "train-00002-of-00010": 1}.items():
        assert len(open_source("webdataset", split, path=str(root))) == count
    for split in ("trai", "val-0", "fol"):
        with pytest.raises(UserError, match="No tar shards of a split"):
            open_source("webdataset", split, path=str(root))


def test_a_member_too_large_for_an_image_is_not_read(
    shards: tuple[Path, list[bytes], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvim_jax.data.sources.webdataset.MAX_BYTES", 9)
    source = open_source("webdataset", "train", path=str(shards[0]))
    with pytest.raises(DecodeError, match=r"1000.png: \d+ bytes are too many"):
        source[5]


def test_it_feeds_the_pipeline(shards: tuple[Path, list[bytes], list[int]]) -> None:
    root, _, labels = shards
    config = ClassificationData(
        source="webdataset", path=str(root), eval_split="train", image_size=8, batch_size=4
    )
    batches = list(make_eval_iterator(config))
    found = np.concatenate([batch["label"][batch["valid"]] for batch in batches])
    assert found.tolist() == labels


def test_it_says_what_is_wrong(shards: tuple[Path, list[bytes], list[int]]) -> None:
    root, images, _ = shards
    path = str(root)
    with pytest.raises(UserError, match=r"splits found there: test, train. Did you mean 'train'"):
        open_source("webdataset", "trian", path=path)
    _shard(root / "bare-0.tar", {"a.png": images[0], "b.png": images[1], "b.cls": b"one"})
    with pytest.raises(UserError, match=r"bare-0.tar.*2 images have no label.*a.png"):
        open_source("webdataset", "bare", path=path)
    _shard(root / "empty-0.tar", {"readme.txt": b"nothing"})
    with pytest.raises(UserError, match="hold no labelled image"):
        open_source("webdataset", "empty", path=path)
    (root / "junk-0.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(UserError, match=r"junk-0.tar.*cannot be read as a tar"):
        open_source("webdataset", "junk", path=path)
    (root / "classes.txt").write_text("ant\n")
    with pytest.raises(UserError, match="label 3, but the class list names only 1"):
        open_source("webdataset", "test", path=path)

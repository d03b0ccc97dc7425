"""Pixel shards cropped on the device: the host's boxes and draws, and its pixels up to rounding."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, make_train_iterator, open_source, transforms
from fastvim_jax.data import classification as pipeline
from fastvim_jax.data.device_crops import largest_box, packed_batches
from fastvim_jax.data.device_resize import resize_packed
from fastvim_jax.data.pixel_boxes import BoxReader
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.distributed import make_mesh, place_batch
from fastvim_jax.errors import UserError


@pytest.fixture
def config(image_tree: Path, tmp_path: Path) -> ClassificationData:
    """Write shards of the image tree: noise of several sizes, and one grey, one wide and one tall image."""
    train = image_tree / "train" / "ant"
    Image.open(train / "02.png").convert("L").save(train / "02.png")
    Image.open(train / "04.png").resize((90, 30)).save(train / "04.png")
    Image.open(train / "05.png").resize((17, 80)).save(train / "05.png")
    tree = open_source("image_folder", "train", path=str(image_tree))
    prepare(tree, tmp_path / "pixels", "train", pixels=32, shard_records=7)
    return ClassificationData(
        source="pixels", path=str(tmp_path / "pixels"), image_size=(12, 18), batch_size=8,
        augment_on="device", rand_augment=9.0, colour_jitter=0.3,
    )  # fmt: skip


def _taken(config: ClassificationData, seed: int, count: int, **share: int) -> list[dict]:
    with contextlib.closing(make_train_iterator(config, seed=seed, **share)) as batches:
        return [jax.device_get(next(batches)) for _ in range(count)]


def _assert_same(ours: list[dict], theirs: list[dict]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_crops_are_pillows(rng: np.random.Generator) -> None:
    """Compare crops of boxes smaller and larger than the result, grey and colour, with Pillow's.

    They differ where a half is rounded, by two levels at most.
    """
    size, most = (12, 18), (48, 64)
    crops, table, start = [], [], 5  # the buffer begins with other bytes
    parts = [rng.integers(0, 256, start, dtype=np.uint8)]
    for number in range(24):
        height, width = int(rng.integers(1, 49)), int(rng.integers(1, 65))
        channels = 1 if number % 4 == 0 else 3
        pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        parts.append(pixels.ravel())
        table.append((start, height, width, channels))
        start += pixels.size
        crop = np.broadcast_to(pixels, (height, width, 3))
        crops.append(Image.fromarray(np.ascontiguousarray(crop)))
    buffer, rows = np.concatenate(parts), np.asarray(table, np.int32)
    ours, _ = resize_packed(buffer, rows, size=size, most=most)
    offs = []
    for out, crop in zip(np.asarray(ours).astype(int), crops, strict=True):
        # Rows first, whatever Pillow would choose.
        narrow = crop.resize((size[1], crop.height), Image.Resampling.BICUBIC)
        offs.append(np.abs(out - np.asarray(narrow.resize(size[::-1], Image.Resampling.BICUBIC))))
    assert np.max(offs) <= 2 and np.mean(offs) < 0.01


def test_batches_are_the_hosts(
    config: ClassificationData, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare batches with the host's: the same records, labels and draws.

    Pixels differ where Pillow resizes columns first, or clips in between.
    """
    ours = _taken(config, seed, 7)
    monkeypatch.setattr(pipeline, "crops_on_device", lambda _: False)
    host = _taken(dataclasses.replace(config, decoder="pillow"), seed, 7)
    for a, b in zip(ours, host, strict=True):
        assert isinstance(b["image"], np.ndarray) and a["image"].shape == b["image"].shape
        assert np.abs(a["image"].astype(int) - b["image"]).mean() < 1  # noise, the worst case
    drop = [{k: v for k, v in batch.items() if k != "image"} for batch in (*ours, *host)]
    assert {"label", "flip", "operation", "level", "jitter", "factor"} == set(drop[0])
    _assert_same(drop[:7], drop[7:])


@pytest.mark.drawn("data pipelines", one_in=6)
def test_workers_processes_and_restarts_change_nothing(
    config: ClassificationData, seed: int
) -> None:
    whole = _taken(config, seed, 5)
    _assert_same(_taken(dataclasses.replace(config, workers=1), seed, 5), whole)
    shares = [_taken(config, seed, 5, process_index=i, process_count=2) for i in range(2)]
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*shares, strict=True)
    ]
    _assert_same(joined, whole)
    mesh = make_mesh()
    batches = DevicePrefetch(
        make_train_iterator(config, seed=seed, mesh=mesh), lambda batch: place_batch(mesh, batch)
    )
    with contextlib.closing(batches):
        batches.set_state(json.loads(json.dumps({**batches.get_state(), "batches": 2})))
        _assert_same([jax.device_get(next(batches)) for _ in range(3)], whole[2:])
    part = dataclasses.replace(config, train_split="train[3:]", batch_size=27)
    ((labels, image),) = ((b["label"], b["image"]) for b in _taken(part, seed, 1))
    source = open_source("pixels", "train", path=config.path)
    assert sorted(labels) == sorted(source.labels[3:]) and image.shape == (27, 12, 18, 3)


def test_a_label_of_no_class_is_replaced(config: ClassificationData, seed: int) -> None:
    """Replace a record without a valid label, as an undecodable one is: count it, and draw another in its place."""
    file = Path(config.path) / "train.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "class_names": ["ant"]}))
    some = dataclasses.replace(config, max_corrupt=7)
    with contextlib.closing(make_train_iterator(some, seed=seed)) as batches:
        labels = [label for _ in range(9) for label in np.asarray(next(batches)["label"])]
        assert set(labels) == {0} and batches.corrupt
    with pytest.raises(UserError, match="outside the 1 class"):
        _taken(config, seed, 9)


def test_no_box_is_larger_than_the_bound(rng: np.random.Generator) -> None:
    heights, widths = rng.integers(1, 400, (2, 40))
    for aspect in ((3 / 4, 4 / 3), (0.2, 0.5), (2.0, 3.0)):
        tall, wide = largest_box(heights, widths, aspect)
        assert tall % 16 == wide % 16 == 0 and tall <= 400 and wide <= 400
        for height, width in zip(heights.tolist(), widths.tolist(), strict=True):
            for _ in range(20):
                left, top, right, bottom = transforms.random_box(
                    width, height, rng, (0.5, 1.0), aspect
                )
                assert bottom - top <= tall and right - left <= wide


def test_memory_is_used_again_only_when_the_device_has_copied_it(
    config: ClassificationData, seed: int
) -> None:
    source = open_source("pixels", "train", path=config.path)
    numbered = pipeline.train_batches(source, config, seed=seed, batch_size=8)
    parts = [slice(0, 3), slice(3, 8)]
    plans = (numbered[i] for i in itertools.count())
    waited = []

    class Used:
        def __init__(self, number: int) -> None:
            self.number = number

        def block_until_ready(self) -> None:
            waited.append(self.number)

    with contextlib.closing(packed_batches(plans, source, parts)) as batches:
        for number in range(8):
            _, packed, buffer = next(batches)
            crop = numbered[number]["crop"]
            for part, one in zip(parts, packed, strict=True):
                for box, (start, *shape) in zip(crop[part], one.table.tolist(), strict=True):
                    height, width, channels = shape
                    file, first, full, *_ = box.tolist()
                    stored = np.memmap(source.files[file], np.uint8, "r")
                    for row in range(height):
                        line = one.pixels[start + row * width * channels :][: width * channels]
                        there = stored[first + row * full * channels :][: width * channels]
                        np.testing.assert_array_equal(line, there)
            # Two batches are read ahead, and there is memory for four.
            assert waited == list(range(number - 2))
            buffer.in_use.append(Used(number))  # type: ignore[arg-type]


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "some.pixels"
    file.write_bytes(b"0123456789")
    into = np.zeros(8, np.uint8)

    def read(number: int, offset: int) -> None:
        box = np.asarray([[number, offset, 4, 2, 3, 1]])
        for future in reader.read(box, np.asarray([1]), into):
            future.result()

    with contextlib.closing(BoxReader([file, tmp_path / "none"], threads=2)) as reader:
        read(0, 2)
        assert into.tobytes() == b"\0" + b"234678" + b"\0"
        with pytest.raises(UserError, match=r"some\.pixels' has become shorter"):
            read(0, 4)
        with pytest.raises(UserError, match="none' cannot be read: No such file"):
            read(1, 0)

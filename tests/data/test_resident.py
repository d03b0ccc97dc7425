"""Resident images: the grain pipeline's pictures, a new order each epoch, exact counts, exact restarts."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from fastvim_jax.data import (
    ClassificationData,
    DecodeError,
    make_eval_iterator,
    make_train_iterator,
)
from fastvim_jax.data import resident as resident_module
from fastvim_jax.errors import UserError

DIGITS = ClassificationData(
    source="digits", channels=1, image_size=8, batch_size=100, crop="pad_shift", pad=2,
    flip=0.5, eval_crop=1.0, mean=(0.5,), std=(0.5,), resident=True,
)  # fmt: skip
STEPS = 14


def _take(iterator, count):
    return [jax.device_get(dict(next(iterator))) for _ in range(count)]


def _pairs(batches):
    return Counter(
        (image.tobytes(), int(label))
        for batch in batches
        for image, label in zip(batch["image"], batch["label"], strict=True)
    )


def _assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def _same_images_as_the_pipeline(config, seed):
    """Compare whole epochs of both iterators, unaugmented: they hold the same labelled images."""
    resident = make_train_iterator(dataclasses.replace(config, resident=True), seed=seed)
    plain = dataclasses.replace(config, crop="resize", flip=0.0, resident=False)
    grain = make_train_iterator(plain, seed=seed)
    assert resident.steps_per_epoch == grain.steps_per_epoch
    ours, theirs = (_take(it, it.steps_per_epoch) for it in (resident, grain))
    grain.close()
    assert ours[0]["image"].dtype == np.uint8 and ours[0]["label"].dtype == np.int32
    assert _pairs(ours) == _pairs(theirs)


@pytest.mark.drawn("data pipelines", one_in=6)
def test_an_epoch_holds_the_images_that_the_pipeline_decodes(seed: int) -> None:
    _same_images_as_the_pipeline(dataclasses.replace(DIGITS, batch_size=479), seed)  # 3 * 479 = all
    larger = dataclasses.replace(DIGITS, batch_size=479, image_size=(12, 10))
    _same_images_as_the_pipeline(larger, seed)


@pytest.mark.drawn("data pipelines", one_in=6)
def test_real_cifar(real_data: Path, seed: int) -> None:
    config = ClassificationData(
        source="packed_npz", path=str(real_data / "cifar10"), image_size=32, crop="pad_shift",
        batch_size=250, train_split="test[:1000]", eval_split="test[9000:]", eval_crop=1.0,
    )  # fmt: skip
    _same_images_as_the_pipeline(config, seed)
    scored = [make_eval_iterator(dataclasses.replace(config, resident=r)) for r in (True, False)]
    _assert_same(*(_take(it, 4) for it in scored))


def test_batches_are_on_the_device(seed: int) -> None:
    batch = next(make_train_iterator(DIGITS, seed=seed))
    assert isinstance(batch["image"], jax.Array) and batch["image"].shape == (100, 8, 8, 1)


def test_each_epoch_and_seed_has_its_own_order(seed: int) -> None:
    iterator = make_train_iterator(DIGITS, seed=seed)
    epochs = [_take(iterator, STEPS) for _ in range(2)]
    for epoch in epochs:
        assert len({image.tobytes() for b in epoch for image in b["image"]}) > 1380  # of 1400
    assert not np.array_equal(epochs[0][0]["image"], epochs[1][0]["image"])
    other = next(make_train_iterator(DIGITS, seed=seed + 1))
    assert not np.array_equal(other["image"], epochs[0][0]["image"])


@pytest.mark.drawn("data pipelines", one_in=6)
@pytest.mark.parametrize("taken", [0, 3, STEPS, STEPS + 5])
def test_a_restart_continues(seed: int, taken: int) -> None:
    first = make_train_iterator(DIGITS, seed=seed)
    _take(first, taken)
    state = json.loads(json.dumps(first.get_state()))
    expected = _take(first, STEPS + 1)
    second = make_train_iterator(DIGITS, seed=seed)
    _take(second, 1)
    second.set_state(state)
    _assert_same(_take(second, STEPS + 1), expected)
    with pytest.raises(UserError, match="batch_size = 100"):
        smaller = dataclasses.replace(DIGITS, batch_size=50)
        make_train_iterator(smaller, seed=seed).set_state(state)
    with pytest.raises(UserError, match="order"):
        plain = make_train_iterator(dataclasses.replace(DIGITS, resident=False), seed=seed)
        second.set_state(plain.get_state())


@pytest.mark.drawn("data pipelines", one_in=6)
def test_processes_share_one_global_batch(seed: int) -> None:
    whole = _take(make_train_iterator(DIGITS, seed=seed), 2)
    shares = [
        _take(make_train_iterator(DIGITS, seed=seed, process_index=i, process_count=4), 2)
        for i in range(4)
    ]
    joined = [
        {key: np.concatenate([share[step][key] for share in shares]) for key in whole[0]}
        for step in range(2)
    ]
    _assert_same(joined, whole)


def test_evaluation_is_the_pipelines_and_rewinds() -> None:
    resident = make_eval_iterator(DIGITS, batch_size=48)
    plain = make_eval_iterator(dataclasses.replace(DIGITS, resident=False), batch_size=48)
    expected = [dict(batch) for batch in plain]
    assert sum(int(b["valid"].sum()) for b in expected) == 360
    for _ in range(2):
        _assert_same([jax.device_get(dict(batch)) for batch in resident], expected)
        resident.rewind()
    plain.rewind()
    _assert_same([dict(batch) for batch in plain], expected)
    shares = [
        [
            jax.device_get(dict(b))
            for b in make_eval_iterator(DIGITS, batch_size=48, process_index=i, process_count=2)
        ]
        for i in range(2)
    ]
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*shares, strict=True)
    ]
    _assert_same(joined, expected)


def test_undecodable_records_are_left_out_and_counted(image_tree: Path, seed: int) -> None:
    broken = image_tree / "train" / "ant" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    config = ClassificationData(
        source="image_folder", path=str(image_tree), image_size=(12, 16), batch_size=29,
        crop="resize", resident=True, max_corrupt=1,
    )  # fmt: skip
    iterator = make_train_iterator(config, seed=seed)
    images = {image.tobytes() for image in _take(iterator, 1)[0]["image"]}
    assert len(images) == 29 and iterator.corrupt == {3}
    with pytest.raises(DecodeError, match=r"ant/03.png(?s:.*)max_corrupt allows 0"):
        next(make_train_iterator(dataclasses.replace(config, max_corrupt=0), seed=seed))
    with pytest.raises(UserError, match="only 29 images that can be decoded"):
        make_train_iterator(dataclasses.replace(config, batch_size=30), seed=seed)


def test_what_the_device_cannot_do_is_refused() -> None:
    for field, value in {"rand_augment": 9.0, "colour_jitter": 0.3}.items():
        with pytest.raises(UserError, match=rf"data\.{field} .*augment_on=device.*resident=True"):
            dataclasses.replace(DIGITS, **{field: value})
        dataclasses.replace(DIGITS, augment_on="device", **{field: value})


def test_too_many_images_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_module, "_SHARE_OF_MEMORY", 1e-9)
    with pytest.raises(UserError, match=r"needs .* GiB for 1437 images"):
        make_train_iterator(DIGITS, seed=0)

"""Batches ahead of time: the same ones, read while others are worked on, and a position that counts those taken."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fastvim_jax.data import (
    ClassificationData,
    DecodeError,
    make_eval_iterator,
    make_train_iterator,
    stream,
)
from fastvim_jax.data.prefetch import DevicePrefetch, place_ahead
from fastvim_jax.errors import UserError

DIGITS = ClassificationData(
    source="digits", channels=1, image_size=8, batch_size=100, crop="pad_shift", pad=1,
    eval_crop=1.0, mean=(0.5,), std=(0.5,),
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name == "device prefetch"]


def _take(iterator, count):
    return [jax.device_get(dict(next(iterator))) for _ in range(count)]


def _assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.drawn("data pipelines", one_in=6)
@pytest.mark.parametrize("resident", [False, True])
def test_the_same_batches_on_the_device(seed, resident):
    config = dataclasses.replace(DIGITS, resident=resident)
    expected = _take(make_train_iterator(config, seed=seed), 16)
    prefetch = DevicePrefetch(make_train_iterator(config, seed=seed), jax.device_put)
    batch = next(prefetch)
    assert isinstance(batch["image"], jax.Array)
    _assert_same([jax.device_get(dict(batch)), *_take(prefetch, 15)], expected)
    prefetch.close()


@pytest.mark.drawn("data pipelines", one_in=6)
def test_the_position_counts_the_batches_taken(seed):
    prefetch = DevicePrefetch(make_train_iterator(DIGITS, seed=seed), jax.device_put, ahead=3)
    assert prefetch.get_state()["batches"] == 0
    _take(prefetch, 4)
    time.sleep(0.3)  # The thread is ahead by now.
    state = prefetch.get_state()
    assert state["batches"] == 4
    expected = _take(prefetch, 5)
    prefetch.set_state(state)
    _assert_same(_take(prefetch, 5), expected)
    prefetch.set_state(state)
    prefetch.close()  # After closing it goes on where it was, too.
    _assert_same(_take(prefetch, 5), expected)
    prefetch.close()
    other = make_train_iterator(DIGITS, seed=seed)
    other.set_state(state)
    _assert_same(_take(other, 5), expected)


def test_batches_are_made_while_the_last_one_is_worked_on(seed):
    """Place the next batches without being asked for them. No more than two wait for their turn."""
    placed = threading.Semaphore(0)
    count = 0

    def place(batch):
        nonlocal count
        count += 1
        placed.release()
        return batch

    prefetch = DevicePrefetch(make_train_iterator(DIGITS, seed=seed), place)
    for taken in range(1, 6):
        next(prefetch)
        # While this one is worked on, the next one is placed: nobody asks for it before it is.
        while count < taken + 1:
            assert placed.acquire(timeout=60), "no batch was made ahead"
    time.sleep(0.2)  # Time to run away in.
    prefetch.close()
    assert 6 <= count <= 5 + 3  # Two wait, one more is in passing.


def test_an_error_comes_with_the_batch_it_belongs_to(image_tree: Path, seed: int) -> None:
    config = ClassificationData(
        source="image_folder", path=str(image_tree), image_size=8, batch_size=2
    )
    count = len(list((image_tree / "test").rglob("*.png")))
    assert count == 6
    (image_tree / "test" / "cat" / "01.png").write_bytes(b"no image")
    prefetch = DevicePrefetch(make_eval_iterator(config), jax.device_put)
    _take(prefetch, 2)
    for _ in range(2):
        with pytest.raises(DecodeError, match=r"cat/01.png"):
            next(prefetch)
    allowed = dataclasses.replace(config, max_corrupt=1)
    prefetch = DevicePrefetch(make_eval_iterator(allowed), jax.device_put)
    _take(prefetch, 2)
    time.sleep(0.2)
    assert prefetch.corrupt == set()  # That record is still ahead.
    _take(prefetch, 1)
    assert prefetch.corrupt == {5}
    with pytest.raises(StopIteration):
        next(prefetch)


@pytest.mark.drawn("data pipelines", one_in=6)
def test_workers_memory_is_lent_until_it_is_placed(seed, monkeypatch):
    """Hold a worker's shared memory until its batch is placed.

    On a GPU the shared memory itself goes to the device; here `place` copies as the device would.
    """
    monkeypatch.setattr(stream, "_SMALL", 0)  # these batches are small
    config = dataclasses.replace(DIGITS, workers=1)
    expected = _take(make_train_iterator(DIGITS, seed=seed), 4)
    iterator = make_train_iterator(config, seed=seed)
    prefetch = DevicePrefetch(
        iterator, lambda batch: {k: jax.numpy.array(v) for k, v in batch.items()}
    )
    iterator.lend = True
    _assert_same(_take(prefetch, 4), expected)
    assert prefetch.seconds_per_batch() > 0
    prefetch.close()
    assert type(next(iterator)["image"]) is not np.ndarray
    iterator.lend = False
    assert type(next(iterator)["image"]) is np.ndarray
    iterator.close()


def test_a_pass_is_placed_ahead_and_ends():
    batches = make_eval_iterator(DIGITS, batch_size=100)
    expected = [dict(batch) for batch in batches]
    placed = []

    def place(batch):
        placed.append(threading.current_thread().name)
        return jax.device_put(dict(batch))

    for _ in range(2):
        batches.rewind()
        _assert_same([jax.device_get(batch) for batch in place_ahead(batches, place)], expected)
    assert placed == ["device prefetch"] * 8
    batches.rewind()
    first = place_ahead(batches, place)
    next(first)
    first.close()  # before its end
    batches.close()


def test_an_error_while_placing_ahead_is_raised_where_the_batches_are_read():
    def place(batch):
        raise UserError("no room")

    batches = make_eval_iterator(DIGITS, batch_size=100)
    with pytest.raises(UserError, match="no room"):
        next(place_ahead(batches, place))
    batches.close()

"""A batch split among the cores of a CPU gives what it gives as a whole, and its shares run at the same time."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.layers import cores
from fastvim_jax.models import shares

WEIGHTS = jnp.arange(1.0, 4.0)


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(shares, "local_cores", lambda: 4)


def test_every_share_is_computed_and_keeps_its_place(four_cores, rng):
    images = jnp.asarray(rng.normal(size=(8, 5, 3)))
    program = jax.jit(lambda weights, images: {"sums": (images * weights).sum(1)})
    share = shares.share_of(jax.ShapeDtypeStruct(images.shape, images.dtype))
    assert share.shape == (2, 5, 3)
    compiled = program.lower(WEIGHTS, share).compile()
    for each in (program, compiled):
        found = shares.run_in_shares(each, WEIGHTS, images, 2)
        np.testing.assert_allclose(found["sums"], program(WEIGHTS, images)["sums"], rtol=1e-6)


def test_shares_run_at_the_same_time_and_on_one_core_each(four_cores, monkeypatch):
    monkeypatch.setattr(cores, "local_cores", lambda: 4)
    together = threading.Barrier(4, timeout=60)
    seen = []

    def program(weights, images):
        together.wait()  # Raises if the shares run one after the other.
        seen.append(cores.program_cores())
        return images

    images = np.arange(8)
    assert (shares.run_in_shares(program, None, images, 2) == images).all()
    assert seen == [1] * 4
    assert cores.program_cores() == 4


def test_an_error_in_a_share_reaches_the_caller(four_cores):
    def program(weights, images):
        if 7 in images:
            raise ValueError("seven")
        return images

    with pytest.raises(ValueError, match="seven"):
        shares.run_in_shares(program, None, np.arange(8), 2)


@pytest.mark.parametrize(
    ("batch", "available", "count"),
    [(16, 2, 2), (1, 2, 1), (7, 2, 1), (6, 4, 3), (16, 0, 1), (0, 2, 1)],
)
def test_shares_are_equal_and_at_most_one_for_each_core(monkeypatch, batch, available, count):
    monkeypatch.setattr(shares, "local_cores", lambda: available)
    assert shares.share_count(batch) == count


def test_one_share_is_the_whole_batch_and_does_not_wait():
    images = object.__new__(type("Images", (), {"__len__": lambda self: 8}))
    assert shares.run_in_shares(lambda weights, images: images, None, images, 8) is images


def test_shares_are_traced_for_one_core_and_a_whole_batch_for_all(monkeypatch):
    for module in (shares, cores):
        monkeypatch.setattr(module, "local_cores", lambda: 4)
    for batch, seen in ((8, 1), (1, 4)):
        with shares.tracing_share_of(batch):
            assert cores.program_cores() == seen

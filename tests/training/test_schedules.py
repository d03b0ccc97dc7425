"""Schedules: their defining points, host against traced, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.training.config import OptimizerConfig
from fastvim_jax.training.optimizer import learning_rate_schedule, weight_decay_schedule
from fastvim_jax.training.schedules import (
    constant,
    epoch_cosine,
    scaled_learning_rate,
    warmup_cosine,
)


def test_warm_up_includes_both_ends_and_the_peak_comes_twice(rng):
    warmup, cosine = int(rng.integers(2, 20)), int(rng.integers(2, 30))
    schedule = warmup_cosine(
        peak=3.0, total_steps=warmup + cosine, warmup_steps=warmup, start=0.5, final=0.1
    )
    values = schedule(np.arange(warmup + cosine + 5))
    np.testing.assert_allclose(values[:warmup], np.linspace(0.5, 3.0, warmup), rtol=1e-14)
    assert values[warmup] == 3.0
    phase = np.pi * np.arange(cosine) / cosine
    expected = 0.1 + 2.9 * (1 + np.cos(phase)) / 2
    np.testing.assert_allclose(values[warmup : warmup + cosine], expected, rtol=1e-14)
    np.testing.assert_allclose(values[warmup + cosine :], 0.1, rtol=1e-14)


def test_one_step_of_warm_up_is_the_start():
    values = warmup_cosine(peak=2.0, total_steps=3, warmup_steps=1, start=0.5)(np.arange(3))
    np.testing.assert_allclose(values, [0.5, 2.0, 1.0])


def test_a_final_value_above_the_first_rises():
    values = warmup_cosine(peak=0.04, final=0.4, total_steps=50)(np.arange(50))
    assert values[0] == pytest.approx(0.04)
    assert (np.diff(values) > 0).all() and values[-1] < 0.4


def test_epochs_are_fractional():
    schedule = epoch_cosine(peak=1.0, epochs=6, steps_per_epoch=5, warmup_epochs=2, final=0.2)
    values = schedule(np.arange(30))
    np.testing.assert_allclose(values[:10], np.arange(10) / 10, atol=1e-15)
    assert values[10] == 1.0
    assert values[20] == pytest.approx(0.6)  # half way between the peak and the floor
    assert (np.diff(values[10:]) < 0).all() and values[-1] > 0.2


def test_accumulation_holds_the_value_and_restarts_every_epoch():
    schedule = epoch_cosine(peak=1.0, epochs=4, steps_per_epoch=5, warmup_epochs=1, accumulation=2)
    every = epoch_cosine(peak=1.0, epochs=4, steps_per_epoch=5, warmup_epochs=1)
    source = np.array([0, 0, 2, 2, 4, 5, 5, 7, 7, 9])
    np.testing.assert_array_equal(schedule(np.arange(10)), every(source))


@pytest.mark.parametrize(
    "schedule",
    [
        warmup_cosine(peak=2e-3, total_steps=90, warmup_steps=30, start=1e-6, final=1e-5),
        epoch_cosine(peak=2e-3, epochs=9, steps_per_epoch=10, warmup_epochs=2, final=1e-5),
        constant(0.3),
    ],
)
def test_traced_equals_host(schedule):
    steps = np.arange(90)
    traced = jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32))
    assert schedule(steps).dtype == np.float64
    np.testing.assert_allclose(traced, schedule(steps), rtol=2e-6, atol=1e-10)


def test_scaling_rules():
    assert scaled_learning_rate(1e-3, 1024, "deit") == pytest.approx(2e-3)
    assert scaled_learning_rate(1e-3, 1024, "linear") == pytest.approx(4e-3)
    assert scaled_learning_rate(1e-3, 4096, "sqrt") == pytest.approx(2e-3)
    assert scaled_learning_rate(1e-3, 7, "none") == 1e-3
    with pytest.raises(ValueError, match="unknown learning-rate scaling rule 'cubic'"):
        scaled_learning_rate(1e-3, 7, "cubic")


@pytest.mark.parametrize(
    "make",
    [
        lambda: warmup_cosine(peak=1.0, total_steps=5, warmup_steps=5),
        lambda: epoch_cosine(peak=1.0, epochs=2, steps_per_epoch=5, warmup_epochs=2),
    ],
)
def test_a_warm_up_that_fills_the_run_is_refused(make):
    with pytest.raises(ValueError, match="leaves nothing to decay over"):
        make()


def test_a_config_gives_its_recipe():
    recipe = OptimizerConfig(warmup_epochs=5.0)
    rate = learning_rate_schedule(recipe, batch_size=1024, steps_per_epoch=1251, epochs=300)
    assert rate(0) == pytest.approx(1e-6)
    assert rate(5 * 1251 - 1) == rate(5 * 1251) == pytest.approx(2e-3)
    assert rate(300 * 1251) == pytest.approx(1e-5)
    fractional = learning_rate_schedule(
        OptimizerConfig(schedule="epoch_cosine", learning_rate_scaling="linear"),
        batch_size=512,
        steps_per_epoch=10,
        epochs=100,
    )
    assert fractional(0) == 0.0 and fractional(50) == pytest.approx(2e-3)
    assert fractional(25) == pytest.approx(1e-3)
    cells = OptimizerConfig(weight_decay=0.04, weight_decay_end=0.4)
    decay = weight_decay_schedule(cells, total_steps=100)
    assert decay(0) == pytest.approx(0.04) and decay(50) == pytest.approx(0.22)
    assert weight_decay_schedule(recipe, total_steps=100)(70) == 0.05

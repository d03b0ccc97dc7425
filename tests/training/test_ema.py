"""The average of the weights."""

import jax.numpy as jnp
import numpy as np

from fastvim_jax.training.ema import init_ema, update_ema
from tests.support import assert_close, x64


def test_average_of_a_history_from_its_closed_form(rng):
    history = rng.normal(size=(7, 3, 2))
    decay = float(rng.uniform(0.5, 0.9999))
    with x64():
        ema = init_ema({"w": jnp.asarray(history[0])})
        for weights in history[1:]:
            ema = update_ema(ema, {"w": jnp.asarray(weights)}, decay)
        steps = len(history) - 1
        expected = decay**steps * history[0] + sum(
            (1 - decay) * decay ** (steps - i) * history[i] for i in range(1, steps + 1)
        )
        assert_close(ema["w"], expected, 1e-12)


def test_the_average_starts_in_buffers_of_its_own():
    weights = {"w": jnp.arange(4.0)}
    ema = init_ema(weights)
    np.testing.assert_array_equal(ema["w"], weights["w"])
    assert ema["w"].unsafe_buffer_pointer() != weights["w"].unsafe_buffer_pointer()


def test_a_float32_average_of_half_precision_weights_stays_float32():
    ema = update_ema({"w": jnp.ones(3, jnp.float32)}, {"w": jnp.zeros(3, jnp.bfloat16)}, 0.9999)
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema["w"], 0.9999, rtol=1e-7)

"""Powers of two by a polynomial are as exact as XLA's, and end where float32 ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.exponential import exp2
from tests.support import x64

T = np.concatenate([np.linspace(-126, 127.999, 40001), np.linspace(-1, 1, 20001)]).astype(
    np.float32
)


def test_the_relative_error_is_below_two_rounding_errors():
    wanted = np.exp2(T.astype(np.float64))
    error = np.abs(np.asarray(jax.jit(exp2)(T), np.float64) - wanted) / wanted
    assert error.max() < np.finfo(np.float32).eps


def test_it_ends_at_normal_numbers():
    t = jnp.array([-jnp.inf, -200, 0, 1, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(exp2(t), [2.0**-126, 2.0**-126, 1, 2, np.nan])
    large = exp2(jnp.array([128, 200, jnp.inf], jnp.float32))
    assert np.all(np.asarray(large) > 0.99 * np.finfo(np.float32).max)


def test_derivatives_are_those_of_a_power_of_two():
    t = T[T > -124][::300]  # Smaller ones have derivatives that are not normal numbers.
    wanted = np.exp2(t.astype(np.float64)) * np.log(2)
    np.testing.assert_allclose(jax.vmap(jax.grad(exp2))(t), wanted, rtol=1e-6)
    second = jax.vmap(jax.grad(jax.grad(exp2)))(t)
    np.testing.assert_allclose(second, wanted * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_keep_xlas_own(dtype):
    with x64():
        t = jnp.asarray(T[::100], dtype)
        np.testing.assert_array_equal(exp2(t), jnp.exp2(t))
        assert exp2(t).dtype == t.dtype

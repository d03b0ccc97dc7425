"""Softplus without a logarithm is as exact as with one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.softplus import softplus
from tests.support import x64

X = np.concatenate([np.linspace(-80, 80, 40001), np.linspace(-1, 1, 20001)]).astype(np.float32)


def test_the_relative_error_is_a_few_rounding_errors_everywhere():
    wanted = np.logaddexp(X.astype(np.float64), 0)
    error = np.abs(np.asarray(jax.jit(softplus)(X), np.float64) - wanted) / wanted
    assert error.max() < 3 * np.finfo(np.float32).eps


def test_it_ends_where_float32_ends():
    x = jnp.array([-jnp.inf, -200, 0, 200, jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(softplus(x), [0, 0, np.float32(np.log(2)), 200, np.inf, np.nan])
    np.testing.assert_array_equal(jax.vmap(jax.grad(softplus))(x), [0, 0, 0.5, 1, 1, np.nan])


def test_derivatives_are_those_of_the_logarithm():
    x = X[::200]
    first = jax.vmap(jax.grad(softplus))(x)
    second = jax.vmap(jax.grad(jax.grad(softplus)))(x)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(first, exact, rtol=1e-5)
    np.testing.assert_allclose(second, exact * (1 - exact), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_keep_the_logarithm(dtype):
    with x64():
        x = jnp.asarray(X[::100], dtype)
        np.testing.assert_array_equal(softplus(x), jax.nn.softplus(x))
        assert softplus(x).dtype == x.dtype

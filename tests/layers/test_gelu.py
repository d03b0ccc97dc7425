"""The exact GELU against JAX's, with its gradient, and against the definition in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.layers.gelu import erf, gelu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_jax_own_with_its_gradient(rng, dtype):
    x = jnp.asarray(rng.normal(size=500) * 3, dtype)
    mine, pull = jax.vjp(gelu, x)
    np.testing.assert_array_equal(mine, jax.nn.gelu(x, approximate=False))
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64)
        gradient = jax.vjp(lambda x: jax.nn.gelu(x, approximate=False), wide)[1](
            jnp.ones_like(wide)
        )[0]
    # At x = -0.75 the gradient passes through 0.
    atol = 4e-7 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0].astype(float), gradient, atol=atol)


def test_the_gradient_of_erf(rng):
    x = jnp.asarray(rng.normal(size=500) * 2, jnp.float32)
    np.testing.assert_allclose(
        jax.jvp(erf, [x], [x])[1], jax.jvp(jax.lax.erf, [x], [x])[1], atol=1e-6
    )

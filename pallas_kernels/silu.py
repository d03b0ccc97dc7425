"""SiLU by one hyperbolic tangent instead of an exponential and a division."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def silu(x: jax.Array) -> jax.Array:
    """Compute x · sigmoid(x) as x/2 · (1 + tanh(x/2)), in x's dtype.

    XLA's CPU backend takes less time for it. The absolute error is a rounding error of x. So is the relative error of
    the result where x is positive; where x is far below zero the result is a small difference.
    """
    half = x * 0.5
    return half * (1 + jnp.tanh(half))

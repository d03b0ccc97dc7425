"""SiLU by one hyperbolic tangent instead of an exponential and a division."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def silu(x: jax.Array) -> jax.Array:
    """Compute x · sigmoid(x) as x/2 · (1 + tanh(x/2)), in x's dtype.

    XLA's CPU backend computes this faster than an exponential and a division. The absolute error is a rounding error of
    x. The relative error is as small for positive x, but large for x far below zero, where the result is the small
    difference of two numbers.
    """
    half = x * 0.5
    return half * (1 + jnp.tanh(half))

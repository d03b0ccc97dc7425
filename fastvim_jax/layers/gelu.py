"""Compute the exact GELU, also inside a caller's `jax.shard_map`.

There JAX 0.12 cannot differentiate its own erf and erfc in float32. Steps on several devices run inside one
(`training.reduction.gradient_by_device`).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.dtypes import wide_dtype


def gelu(x: jax.Array) -> jax.Array:
    """Compute x Φ(x) in the dtype of x by erfc, as `jax.nn.gelu(x, approximate=False)` does."""
    return 0.5 * x * _erfc(-x * jnp.asarray(math.sqrt(0.5), x.dtype))


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """Compute erf."""
    return jax.lax.erf(x)


@erf.defjvp
def _erf_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return erf(x), tangent * _slope(x)


@jax.custom_jvp
def _erfc(x: jax.Array) -> jax.Array:
    return jax.lax.erfc(x)


@_erfc.defjvp
def _erfc_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return _erfc(x), -tangent * _slope(x)


def _slope(x: jax.Array) -> jax.Array:
    """Compute the derivative of erf in float32 or wider, rounded to the dtype of x."""
    wide = x.astype(wide_dtype(x.dtype))
    return (2 / math.sqrt(math.pi) * jnp.exp(-wide * wide)).astype(x.dtype)

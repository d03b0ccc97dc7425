"""Compute the exact GELU, also inside a caller's `jax.shard_map`.

There JAX 0.12 cannot differentiate its own erf and erfc in float32. Steps on several devices run inside one
(`training.reduction.gradient_by_device`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dtypes import wide_dtype


def gelu(x: jax.Array) -> jax.Array:
    """Compute x Φ(x) in the dtype of x by erfc, as `jax.nn.gelu(x, approximate=False)` does."""
    return 0.5 * x * _erfc(-x * jnp.asarray(math.sqrt(0.5), x.dtype))


def _with_slope(function: Callable[[jax.Array], jax.Array], sign: float) -> Any:
    """Give `function` the derivative of erf times `sign`, in float32 or wider, rounded to the dtype of x."""
    differentiable: Any = jax.custom_jvp(function)

    @differentiable.defjvp
    def _rule(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        (x,), (tangent,) = primals, tangents
        wide = x.astype(wide_dtype(x.dtype))
        slope = (2 / math.sqrt(math.pi) * jnp.exp(-wide * wide)).astype(x.dtype)
        return differentiable(x), sign * tangent * slope

    return differentiable


erf = _with_slope(jax.lax.erf, 1.0)
_erfc = _with_slope(jax.lax.erfc, -1.0)

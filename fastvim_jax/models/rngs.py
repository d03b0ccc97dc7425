"""Turn a seed, a JAX key or `nnx.Rngs` into `nnx.Rngs`."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.errors import UserError

RngsLike = int | jax.Array | nnx.Rngs


def as_rngs(rngs: Any) -> nnx.Rngs:
    """Return `nnx.Rngs` from an integer seed, a JAX key (`jax.random.key` or `PRNGKey`), or `nnx.Rngs` itself.

    Raises:
        UserError: for anything else.
    """
    if isinstance(rngs, nnx.Rngs):
        return rngs
    if isinstance(rngs, jax.Array) and rngs.ndim <= 1:
        typed = jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key)
        if (typed and rngs.ndim == 0) or (rngs.dtype == jnp.uint32 and rngs.shape == (2,)):
            return nnx.Rngs(rngs)
    try:
        if isinstance(rngs, bool):
            raise TypeError
        return nnx.Rngs(operator.index(rngs))
    except TypeError:
        raise UserError(
            f"rngs={rngs!r} must be an integer seed, a key such as jax.random.key(0), or nnx.Rngs(0)."
        ) from None

"""Stochastic depth (Huang et al. 2016), per sample, without any random state in the model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def drop_path_rates(rate: float, depth: int) -> np.ndarray:
    """Return the rate for each block's output: linear in depth, 0 for the first and `rate` for the last."""
    return np.linspace(0.0, rate, depth)


def draw_keep(
    key: jax.Array, rates: np.ndarray, shape: tuple[int, ...]
) -> Float[Array, "depth ..."]:
    """Draw 0/1 keep masks `depth *shape`; block i draws from `fold_in(key, i)`.

    The caller folds seed and step into `key`, so that masks differ by step, block and sample and a resumed run
    draws the same ones.
    """

    def one(block, rate):
        return jax.random.bernoulli(jax.random.fold_in(key, block), 1.0 - rate, shape)

    return jax.vmap(one)(jnp.arange(len(rates)), jnp.asarray(rates, jnp.float32)).astype(
        jnp.float32
    )


def draw_masks(
    key: jax.Array, rate: float, shape: tuple[int, ...]
) -> Float[Array, "depth ..."] | None:
    """Draw one step's 0/1 masks of this whole shape, `rate` being the last block's; None where nothing is dropped."""
    return draw_keep(key, drop_path_rates(rate, shape[0]), shape[1:]) if rate > 0 else None


def scale_keep(
    keep: Float[Array, "depth ..."], rates: np.ndarray, dtype
) -> Float[Array, "depth ..."]:
    """Turn 0/1 masks into factors on the blocks' outputs: kept ones are divided by (1 - rate)."""
    survive = (1.0 - rates).reshape(-1, *(1,) * (keep.ndim - 1))
    return keep.astype(dtype) / jnp.asarray(np.where(survive > 0, survive, 1.0), dtype)


def keep_factors(
    key: jax.Array | None,
    given: Float[Array, "depth ..."] | None,
    rate: float,
    shape: tuple[Any, ...],
    dtype,
) -> Float[Array, "depth ..."] | None:
    """Return factors for all blocks, from `given` masks `depth *shape` or drawn from `key`; None if nothing is dropped.

    Args:
        key: This step's key, or None outside training.
        given: 0/1 masks to use instead of drawing any.
        rate: Rate at the last block.
        shape: `depth`, then what a mask of one block has: `b`, which may be symbolic, or branches and `b`.
        dtype: Of the factors.
    """
    rates = drop_path_rates(rate, shape[0])
    if given is None and key is not None:
        given = draw_masks(key, rate, shape)
    return None if given is None else scale_keep(given, rates, dtype)

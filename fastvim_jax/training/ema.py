"""Exponential moving average of the weights (recipes: supervised, decay 0.9999).

The average starts as a copy of the first weights, its decay has no warm-up, and it is updated inside the
train step *before* the optimizer's, so that it sees the weights the gradients were taken at.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def init_ema(params: Tree) -> Tree:
    """Copy `params` into buffers of their own, because the train step donates both."""
    return jax.tree.map(jnp.copy, params)


def update_ema(ema: Tree, params: Tree, decay: float) -> Tree:
    """Compute decay · ema + (1 − decay) · params, leaf by leaf, in the dtype of the average."""
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(e.dtype), ema, params)

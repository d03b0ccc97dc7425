"""Compute the rank of the true class, from which top-1 and top-5 follow."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def label_rank(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Count the classes that come before the label: `b classes`, `b` → `b`. Equal logits rank by class number.

    A row that holds a NaN ranks last, so that a broken model is never counted as right.
    """
    label_logit = jnp.take_along_axis(logits, label[:, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < label[:, None]
    rank = ((logits > label_logit) | ((logits == label_logit) & before)).sum(-1)
    return jnp.where(jnp.isnan(logits).any(-1), logits.shape[-1], rank)

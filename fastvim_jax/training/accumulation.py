"""Gradient accumulation: a batch passes through the model in parts, when it is too large for the devices at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fastvim_jax.distributed import split_batch

Loss = Callable[[Any, Any], jax.Array]


def mean_value_and_grad(loss_of: Loss, params: Any, parts: Any) -> tuple[jax.Array, Any]:
    """Mean loss and gradient over parts of equal size, computed one after the other.

    Args:
        loss_of: `loss_of(params, part)`, the mean over a part.
        params: what the gradient is taken of.
        parts: a pytree from `in_parts`; its leading axis counts the parts.
    """

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, part)), None

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(jax.value_and_grad(loss_of), params, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    count = len(jax.tree.leaves(parts)[0])
    loss, gradients = jax.tree.map(lambda leaf: leaf / count, total)
    return loss, gradients


def in_parts(tree: Any, parts: int, axis: int = 0) -> Any:
    """Arrays whose `axis` is the batch, with a new leading axis of `parts`.

    Part i holds the images i, i + parts, i + 2·parts, ...: every device works on its own images in every part.
    """

    def split(leaf: jax.Array) -> jax.Array:
        at = axis % leaf.ndim
        shape = (*leaf.shape[:at], leaf.shape[at] // parts, parts, *leaf.shape[at + 1 :])
        return split_batch(jnp.moveaxis(leaf.reshape(shape), at + 1, 0), axis=at + 1)

    return jax.tree.map(split, tree)

"""Gradient accumulation: a batch passes through the model in parts, when it is too large for the devices at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fastvim_jax.distributed import split_batch

# (params, carry, part) → (loss, (what is averaged over the parts, the next part's carry))
PartLoss = Callable[[Any, Any, Any], tuple[jax.Array, tuple[Any, Any]]]


def mean_value_and_grad(
    loss_of: PartLoss, params: Any, carry: Any, parts: Any
) -> tuple[tuple[jax.Array, Any, Any], Any]:
    """Average a loss, what it reports and its gradient over parts of equal size, computed one after the other.

    Args:
        loss_of: `loss_of(params, carry, part) -> (loss, (report, carry))`, the means over a part.
        params: what the gradient is taken of.
        carry: given to the first part; each part's is given to the next.
        parts: a pytree from `in_parts`; its leading axis counts the parts.

    Returns:
        `((loss, report, carry), gradient)`.
    """
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

    def add(running: Any, part: Any) -> tuple[Any, None]:
        total, carry = running
        (loss, (report, carry)), gradient = value_and_grad(params, carry, part)
        return (jax.tree.map(jnp.add, total, (loss, report, gradient)), carry), None

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    (loss, (report, _)), gradient = jax.eval_shape(value_and_grad, params, carry, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, report, gradient))
    (total, carry), _ = jax.lax.scan(add, (zeros, carry), parts)
    count = len(jax.tree.leaves(parts)[0])
    loss, report, gradient = jax.tree.map(lambda leaf: leaf / count, total)
    return (loss, report, carry), gradient


def in_parts(tree: Any, parts: int) -> Any:
    """Split arrays along their first axis, that of the batch, into `parts`, counted by a new leading axis.

    Part i holds the images i, i + parts, i + 2·parts, ...: every device works on its own images in every part.
    """

    def split(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] // parts, parts, *leaf.shape[1:])
        return split_batch(jnp.moveaxis(leaf.reshape(shape), 1, 0), axis=1)

    return jax.tree.map(split, tree)


def batch_first(masks: Any) -> Any:
    """Move the last axis, the batch of drop-path masks, to the front, as all that is drawn for a step has it."""
    return jax.tree.map(lambda mask: jnp.moveaxis(mask, -1, 0), masks)


def batch_last(masks: Any) -> Any:
    """Undo `batch_first`."""
    return jax.tree.map(lambda mask: jnp.moveaxis(mask, 0, -1), masks)

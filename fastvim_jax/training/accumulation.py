"""Accumulate gradients: pass a batch that is too large for the devices through the model in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fastvim_jax.distributed import split_batch
from pallas_kernels.sharding import mark_varying

# (params, carry, part) → (loss, (report, carry)): reports are averaged over the parts, the carry goes to the next part.
PartLoss = Callable[[Any, Any, Any], tuple[jax.Array, tuple[Any, Any]]]


def mean_value_and_grad(
    loss_of: PartLoss, params: Any, carry: Any, parts: Any
) -> tuple[tuple[jax.Array, Any, Any], Any]:
    """Average a loss, its report and its gradient over parts of equal size, computed one after the other.

    Args:
        loss_of: `loss_of(params, carry, part) -> (loss, (report, carry))`, the means over a part.
        params: the parameters that the loss is differentiated by.
        carry: what the first part starts from, e.g. running statistics. Each part returns the carry of the next one.
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
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)  # noqa: E731
    # Inside a shard_map, the gradient of parameters that vary over the devices varies as well.
    begin = zeros(loss), zeros(report), mark_varying(zeros(gradient), params)
    (total, carry), _ = jax.lax.scan(add, (begin, carry), parts)
    count = len(jax.tree.leaves(parts)[0])
    loss, report, gradient = jax.tree.map(lambda leaf: leaf / count, total)
    return (loss, report, carry), gradient


def in_parts(tree: Any, parts: int) -> Any:
    """Split arrays along their first axis, the batch, into `parts`, along a new leading axis.

    Part i holds the images i, i + parts, i + 2·parts, ... So in every part, every device works on images that it holds.
    """

    def split(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] // parts, parts, *leaf.shape[1:])
        return split_batch(jnp.moveaxis(leaf.reshape(shape), 1, 0), axis=1)

    return jax.tree.map(split, tree)


def batch_first(masks: Any) -> Any:
    """Move the batch axis of drop-path masks from the last to the first place, where `in_parts` expects it."""
    return jax.tree.map(lambda mask: jnp.moveaxis(mask, -1, 0), masks)


def batch_last(masks: Any) -> Any:
    """Undo `batch_first`."""
    return jax.tree.map(lambda mask: jnp.moveaxis(mask, 0, -1), masks)

"""Compute greedy non-maximum suppression: exact, of fixed size, without a loop over boxes.

Greedy suppression keeps box j if no kept box before it (by score) overlaps it by more than the threshold. Iterating
`keep[j] = not any(keep[i] and overlaps[i, j], i < j)` from "keep all" reaches exactly that set: after k steps the first
k boxes are right, and a set that no longer changes is right everywhere. The number of steps is the longest chain of
boxes that suppress each other, about ten on real images. Every step is one product of a vector with a matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastvim_jax.models.detection.boxes import overlaps


class Best(NamedTuple):
    """The best `k` of `n` entries, best first.

    Attributes:
        scores: their scores; 0 for padding.
        indices: their indices.
        valid: False for padding, if fewer than `k` entries were valid.
    """

    scores: Float[Array, "*b k"]
    indices: Int[Array, "*b k"]
    valid: Bool[Array, "*b k"]


def best(scores: Float[Array, "*b n"], valid: Bool[Array, "*b n"], k: int) -> Best:
    """Return the `k` valid entries of highest score, equal scores in index order. If `k` exceeds n, pad."""
    n = scores.shape[-1]
    values, indices = jax.lax.top_k(jnp.where(valid, scores, -jnp.inf), min(k, n))
    found = values > -jnp.inf
    values = jnp.where(found, values, 0)
    pad = [(0, 0)] * (values.ndim - 1) + [(0, max(k - n, 0))]
    return Best(jnp.pad(values, pad), jnp.pad(indices, pad), jnp.pad(found, pad))


def suppress(
    boxes: Float[Array, "*b n 4"],
    valid: Bool[Array, "*b n"],
    threshold: float,
    groups: Int[Array, "*b n"] | None = None,
) -> Bool[Array, "*b n"]:
    """Mark the boxes that greedy suppression keeps.

    Args:
        boxes: In the order of their scores, highest first.
        valid: Boxes that take part; the others are never kept and suppress nothing.
        threshold: A box is removed if its IoU with a kept one exceeds this.
        groups: Class or level of every box; boxes of different groups never suppress each other. None: one group.
    """
    n = boxes.shape[-2]
    clash = overlaps(boxes, boxes) > threshold
    if groups is not None:
        clash &= groups[..., :, None] == groups[..., None, :]
    clash &= jnp.arange(n)[:, None] < jnp.arange(n)
    clash &= valid[..., :, None]

    def step(carry):
        keep, _ = carry
        removed = jnp.any(clash & keep[..., :, None], axis=-2)
        new = valid & ~removed
        return new, jnp.any(new != keep)

    # The first test is made before the loop, so that an empty set of boxes has nothing to iterate.
    keep, _ = jax.lax.while_loop(lambda carry: carry[1], step, (valid, jnp.any(valid)))
    return keep


def nms(
    boxes: Float[Array, "*b n 4"],
    scores: Float[Array, "*b n"],
    valid: Bool[Array, "*b n"],
    threshold: float,
    k: int,
    groups: Int[Array, "*b n"] | None = None,
) -> Best:
    """Suppress boxes that overlap better ones and return the best `k` of the rest.

    Args:
        boxes: In any order.
        scores: Equal ones are ordered by index.
        valid: Boxes that take part.
        threshold: Largest IoU that two kept boxes of one group may have.
        k: Size of the result.
        groups: Class or level of every box; None: one group.
    """
    order = best(scores, valid, scores.shape[-1])
    at = lambda x: jnp.take_along_axis(x, order.indices, -1)  # noqa: E731
    sorted_boxes = jnp.take_along_axis(boxes, order.indices[..., None], -2)
    keep = suppress(sorted_boxes, order.valid, threshold, None if groups is None else at(groups))
    kept = best(order.scores, keep, k)
    return Best(kept.scores, jnp.take_along_axis(order.indices, kept.indices, -1), kept.valid)

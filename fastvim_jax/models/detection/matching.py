"""Which boxes belong to which objects, and which of them a step trains on: all of fixed size, with masks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastvim_jax.models.detection.boxes import overlaps

IGNORED, BACKGROUND = -1, 0


class Assignment(NamedTuple):
    """Object of every box: k + 1 for object k, 0 for background, -1 for neither; and its largest IoU."""

    objects: Int[Array, " n"]
    overlap: Float[Array, " n"]


class Sample(NamedTuple):
    """Boxes drawn for a step: first the positives, then the negatives, each in index order; then unused slots.

    Attributes:
        indices: of the drawn boxes.
        objects: index of the object of a positive, else 0.
        positive: marks positives, which can only stand in the first `limit` slots.
        valid: marks the slots that are used.
    """

    indices: Int[Array, " k"]
    objects: Int[Array, " k"]
    positive: Bool[Array, " k"]
    valid: Bool[Array, " k"]


def assign(
    boxes: Float[Array, "n 4"],
    valid: Bool[Array, " n"],
    objects: Float[Array, "m 4"],
    present: Bool[Array, " m"],
    *,
    positive: float,
    negative: float,
    low_quality: float | None = None,
) -> Assignment:
    """Assign boxes to objects by IoU.

    A box whose largest IoU is below `negative` is background; from `positive` on it belongs to the object of that IoU,
    the first of equal ones. With `low_quality`, an object whose best IoU reaches that value gets every box of exactly
    this IoU, too; where several objects claim a box, the last one has it.

    Args:
        boxes: Anchors or proposals.
        valid: Boxes that take part; the others are ignored.
        objects: Ground truth, padded.
        present: Marks the objects that are not padding.
        positive: Least IoU of a positive box.
        negative: Background lies below this IoU.
        low_quality: Least best IoU of an object for the second rule; None: no second rule.
    """
    iou = jnp.where(valid[:, None] & present, overlaps(boxes, objects), -1.0)
    # Computed once: the second rule compares entries with their own maximum, bit by bit.
    iou = jax.lax.optimization_barrier(iou)
    overlap = jnp.maximum(jnp.max(iou, 1, initial=-1.0), jnp.where(valid, 0.0, -1.0))
    first = (
        jnp.argmax(iou, 1).astype(jnp.int32) if iou.shape[1] else jnp.zeros(len(boxes), jnp.int32)
    )
    matched = jnp.where(overlap < negative, BACKGROUND, IGNORED)
    matched = jnp.where(overlap >= positive, first + 1, matched)
    if low_quality is not None:
        peak = jnp.max(iou, 0)
        claimed = (iou == peak) & (peak >= low_quality)
        last = jnp.max(jnp.where(claimed, jnp.arange(1, iou.shape[1] + 1), 0), 1, initial=0)
        matched = jnp.where(last > 0, last, matched)
    return Assignment(jnp.where(valid, matched, IGNORED).astype(jnp.int32), overlap)


def thin(
    candidates: Bool[Array, " n"], priority: Float[Array, " n"], count: Int[Array, ""], limit: int
) -> Bool[Array, " n"]:
    """Keep the `count` candidates of lowest priority number, or all; `limit` is a static bound on `count`."""
    limit = min(limit, len(candidates))
    values, indices = jax.lax.top_k(jnp.where(candidates, -priority, -jnp.inf), limit)
    kept = (values > -jnp.inf) & (jnp.arange(limit) < count)
    return jnp.zeros_like(candidates).at[indices].max(kept)


def choose(
    assigned: Int[Array, " n"],
    priority: Float[Array, "2 n"],
    *,
    count: int,
    fraction: float,
) -> tuple[Bool[Array, " n"], Bool[Array, " n"]]:
    """Choose at most `count` boxes, at most `fraction` of them positive, and mark positives and negatives.

    Missing positives are made up for by negatives.

    Args:
        assigned: `Assignment.objects`.
        priority: A random number per box, for positives and for negatives; the lowest are taken.
        count: Boxes to choose.
        fraction: Largest share of positives.
    """
    limit = int(count * fraction)
    positives = thin(assigned > 0, priority[0], jnp.asarray(limit), limit)
    left = count - jnp.sum(positives)
    return positives, thin(assigned == BACKGROUND, priority[1], left, count)


def sample(
    assigned: Int[Array, " n"], priority: Float[Array, "2 n"], *, count: int, fraction: float
) -> Sample:
    """Choose boxes as `choose` does and gather their indices into `count` slots."""
    n = len(assigned)
    positives, negatives = choose(assigned, priority, count=count, fraction=fraction)
    index = jnp.arange(n)
    order = jnp.where(positives, index, jnp.where(negatives, n + index, 2 * n + index))
    indices = jnp.argsort(order)[:count]
    if n < count:
        indices = jnp.pad(indices, (0, count - n))
    chosen = (positives | negatives)[indices] & (jnp.arange(count) < n)
    positive = positives[indices] & chosen
    return Sample(indices, jnp.where(positive, assigned[indices] - 1, 0), positive, chosen)

"""Match boxes with objects, and sample the boxes that a step trains on. Arrays have fixed sizes; masks mark entries."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastvim_jax.models.detection.boxes import overlaps

IGNORED, BACKGROUND = -1, 0


class Assignment(NamedTuple):
    """The match of every box.

    Attributes:
        objects: k + 1 for object k, 0 for background, -1 for neither.
        overlap: the box's largest IoU with any object.
    """

    objects: Int[Array, " n"]
    overlap: Float[Array, " n"]


class Sample(NamedTuple):
    """The boxes drawn for a step, `k` slots: first positives, then negatives, each in index order, then unused slots.

    Attributes:
        indices: indices of the drawn boxes.
        objects: for a positive the index of its object, else 0.
        positive: marks positives. They can only fill the first `int(count * fraction)` slots.
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

    A box whose largest IoU is below `negative` is background. If its largest IoU is at least `positive`, the box
    belongs to that object, the first one of equals. With `low_quality`, an object also gets the boxes that overlap it
    best, if their IoU is at least `low_quality`; if several objects claim a box, the last one gets it.

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
    # Keep XLA from computing this twice, because the second rule compares entries with their own maximum, bit by bit.
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
    """Keep the `count` candidates with the lowest priority numbers, or all if there are fewer.

    `limit` is a static bound on `count`.
    """
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

    If there are too few positives, more negatives are chosen.

    Args:
        assigned: `Assignment.objects`.
        priority: One random number per box as a positive and one as a negative; the boxes with the lowest are chosen.
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

"""Compute the cross entropy of pixels, some of which are ignored, and the share of right pixels."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastvim_jax.data.segmentation import IGNORED
from fastvim_jax.layers.resize import (
    fold_resized,
    interpolate,
    linear_matrix,
    neighbours,
    resize_rows,
    resized_argmax,
)
from pallas_kernels.sharding import mark_varying

Divisor = Literal["valid", "all"]
TOGETHER = 8
"""Columns whose gradients are added in one kernel; with 12, XLA makes two that hand gigabytes on."""


def pixel_loss(
    logits: Float[Array, "b rows columns classes"],
    label: Int[Array, "b h w"],
    *,
    divisor: Divisor = "valid",
) -> Float[Array, ""]:
    """Compute the cross entropy at the labels' resolution, averaged over pixels.

    Args:
        logits: of any size; they are resized (bilinear) to the size of the labels.
        label: classes, or `IGNORED`.
        divisor: "valid": mean over the pixels that are not ignored. "all": their sum divided by the number of all
            pixels. This is mmseg's default (`avg_non_ignore=False`), and the released models were trained with it.
    """
    losses = _cross_entropy(resize_rows(logits, label.shape[1]), label)
    valid = label != IGNORED
    count = jnp.maximum(jnp.sum(valid), 1) if divisor == "valid" else label.size
    return jnp.sum(jnp.where(valid, losses, 0.0)) / count


@jax.custom_vjp
def _cross_entropy(
    logits: Float[Array, "b h columns classes"], label: Int[Array, "b h w"]
) -> Float[Array, "b h w"]:
    """Compute each pixel's cross entropy with logits that are resized to the labels' columns.

    The resized logits and their gradients, gigabytes for a batch, are computed where they are read.
    """
    return _cross_entropy_forward(logits, label)[0]


def _cross_entropy_forward(logits, label):
    def add(folded, first, found):
        """Fold the sum of exp(logit - largest so far), the largest so far, and the label's logit."""
        total, largest, picked = folded
        new = functools.reduce(jnp.maximum, found, largest)
        total *= jnp.exp(largest - new)
        for number, each in enumerate(found):
            total += jnp.exp(each - new)
            picked = jnp.where(label == first + number, each, picked)
        return total, new, picked

    start = tuple(jnp.array(value, logits.dtype) for value in (0, -jnp.inf, 0))
    total, largest, picked = fold_resized(add, start, logits, label.shape[2])
    log_sum = largest + jnp.log(total)
    return log_sum - picked, (logits, label, log_sum)


def _cross_entropy_backward(kept, gradient):
    """Give each entry of the logits the gradients of the columns that read it, some columns in one kernel."""
    logits, label, log_sum = kept
    source, target = logits.shape[2], label.shape[2]
    columns, weights = _readers(source, target)
    low, high, shares = neighbours(source, target)
    several = min(TOGETHER, len(columns))
    # Only maps that grow are read by more columns than one kernel adds. Their column 0 is entry 0, which the zeros that
    # fill the tables up say, too: exponentials there are finite before they are multiplied by a weight of 0.
    tables = [columns, weights, low[columns], high[columns], shares[columns]]
    tables = [
        np.pad(table, ((0, -len(table) % several), (0, 0))).reshape(-1, several, source)
        for table in tables
    ]
    classes = jnp.arange(logits.shape[-1])

    def add(total, tables):
        for column, weight, low, high, share in zip(*tables, strict=True):
            weight, share = (x.astype(logits.dtype)[:, None] for x in (weight, share))
            here = lambda x: jnp.take(x, column, axis=2)[..., None]  # noqa: B023, E731
            resized = interpolate(logits, low, high, share, axis=2)
            slope = jnp.exp(resized - here(log_sum)) - (classes == here(label))
            total += slope * (here(gradient) * weight)
        return total, None

    xs = [jnp.asarray(x, logits.dtype if x.dtype.kind == "f" else jnp.int32) for x in tables]
    start = mark_varying(jnp.zeros_like(logits), logits)
    return jax.lax.scan(add, start, tuple(xs))[0], None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _readers(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `target` columns read each of `source` ones, and their weights: two arrays `n source`.

    Where fewer than n columns read one, the others have weight 0.
    """
    matrix = linear_matrix(source, target)
    most = np.count_nonzero(matrix, axis=0).max()
    # A stable sort puts the columns that read first, in their order.
    columns = np.argsort(matrix == 0, axis=0, kind="stable")[:most]
    return columns, np.take_along_axis(matrix, columns, axis=0)


def pixel_accuracy(
    logits: Float[Array, "b rows columns classes"], label: Int[Array, "b h w"]
) -> Float[Array, ""]:
    """Return the share (0 to 1) of the pixels, without ignored ones, whose largest logit is that of the label."""
    valid = label != IGNORED
    right = (resized_argmax(logits, (label.shape[1], label.shape[2])) == label) & valid
    return jnp.sum(right) / jnp.maximum(jnp.sum(valid), 1)

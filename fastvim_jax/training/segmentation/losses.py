"""Compute the cross entropy of pixels, some of which are ignored, and the share of right pixels."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastvim_jax.data.segmentation import IGNORED
from fastvim_jax.layers.resize import (
    interpolate_columns,
    linear_matrix,
    resize_rows,
    resized_argmax,
)

Divisor = Literal["valid", "all"]


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

    The resized logits and their gradients, gigabytes for a batch, are computed where they are read, by the forward pass
    twice (maximum, then sum) and by the backward pass twice, and never written to memory.
    """
    return _cross_entropy_forward(logits, label)[0]


def _cross_entropy_forward(logits, label):
    largest = jnp.max(interpolate_columns(logits, label.shape[2]), axis=-1, keepdims=True)
    # Behind a barrier, since XLA would otherwise write the resized logits to memory, for both to read.
    again, largest = jax.lax.optimization_barrier((logits, largest))
    shifted = interpolate_columns(again, label.shape[2]) - largest
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    # Compared instead of indexed: a gather of single numbers is slower than a sum in the same pass.
    picked = jnp.sum(jnp.where(_is_label(shifted, label), shifted, 0.0), axis=-1)
    return log_sum - picked, (logits, label, log_sum + largest[..., 0])


def _cross_entropy_backward(kept, gradient):
    logits, label, log_sum = kept
    columns, weights = _readers(logits.shape[2], label.shape[2])
    log_sum, label, gradient = (
        jnp.take(x, columns.ravel(), axis=2) for x in (log_sum, label, gradient)
    )
    resized = interpolate_columns(logits, kept[1].shape[2], columns.ravel())
    each = jnp.exp(resized - log_sum[..., None]) - _is_label(resized, label)
    each *= (gradient * jnp.asarray(weights.ravel(), logits.dtype))[..., None]
    by_reader = each.reshape(*logits.shape[:3], -1, logits.shape[3])
    return jnp.sum(by_reader, axis=3), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _is_label(logits, label):
    return jnp.arange(logits.shape[-1]) == label[..., None]


def _readers(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `target` columns read each of `source` ones, and their weights: two arrays `source n`.

    Rows are filled up with column 0 and weight 0.
    """
    matrix = linear_matrix(source, target)
    most = np.count_nonzero(matrix, axis=0).max()
    # A stable sort puts the columns that read first, in their order.
    columns = np.argsort(matrix.T == 0, axis=1, kind="stable")[:, :most]
    return columns, np.take_along_axis(matrix.T, columns, axis=1)


def pixel_accuracy(
    logits: Float[Array, "b rows columns classes"], label: Int[Array, "b h w"]
) -> Float[Array, ""]:
    """Return the share (0 to 1) of the pixels, without ignored ones, whose largest logit is that of the label."""
    valid = label != IGNORED
    right = (resized_argmax(logits, (label.shape[1], label.shape[2])) == label) & valid
    return jnp.sum(right) / jnp.maximum(jnp.sum(valid), 1)

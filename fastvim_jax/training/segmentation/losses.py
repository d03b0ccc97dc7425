"""Compute the cross entropy of pixels, some of which are ignored, and the share of right pixels."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastvim_jax.data.segmentation import IGNORED
from fastvim_jax.layers.resize import resize_bilinear

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
    logits = resize_bilinear(logits, (label.shape[1], label.shape[2]))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    valid = label != IGNORED
    # Compare instead of indexing, so that the gradient is elementwise and not a scatter.
    is_label = jnp.arange(logits.shape[-1]) == label[..., None]
    picked = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    losses = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    count = jnp.maximum(jnp.sum(valid), 1) if divisor == "valid" else label.size
    return jnp.sum(losses) / count


def pixel_accuracy(
    logits: Float[Array, "b rows columns classes"], label: Int[Array, "b h w"]
) -> Float[Array, ""]:
    """Return the share (0 to 1) of the pixels, without ignored ones, whose largest logit is that of the label."""
    logits = resize_bilinear(logits, (label.shape[1], label.shape[2]))
    valid = label != IGNORED
    right = (jnp.argmax(logits, axis=-1) == label) & valid
    return jnp.sum(right) / jnp.maximum(jnp.sum(valid), 1)

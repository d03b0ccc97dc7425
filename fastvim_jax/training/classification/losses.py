"""Classification losses on integer labels or soft targets (recipes: supervised and fine-tuning).

All of them reduce in float32 or wider, whatever the dtype of the logits, and average over the batch.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dtypes import wide_dtype


def smooth_labels(
    labels: Int[Array, " b"], num_classes: int, smoothing: float, dtype: DTypeLike = jnp.float32
) -> Float[Array, "b classes"]:
    """Return one-hot targets with the mass `smoothing` spread evenly over all classes, the true one included.

    Args:
        labels: class numbers, 0 ≤ label < num_classes.
        num_classes: number of classes.
        smoothing: mass taken from the true class, 0 ≤ smoothing < 1.
        dtype: dtype of the result.

    Returns:
        Rows that sum to one.
    """
    one_hot = (labels[:, None] == jnp.arange(num_classes)).astype(dtype)
    return one_hot * (1.0 - smoothing) + smoothing / num_classes


def soft_target_cross_entropy(
    logits: Float[Array, "b classes"], targets: Float[Array, "b classes"]
) -> Float[Array, ""]:
    """Compute the mean over the batch of −Σ targets · log softmax(logits).

    The rows of `targets` are used as given; they need not sum to one.
    """
    return optax.softmax_cross_entropy(_wide(logits), _wide(targets)).mean()


def label_smoothing_cross_entropy(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"], smoothing: float
) -> Float[Array, ""]:
    """Compute the cross entropy with the smoothed targets of `smooth_labels`."""
    logits = _wide(logits)
    targets = smooth_labels(labels, logits.shape[-1], smoothing, logits.dtype)
    return optax.softmax_cross_entropy(logits, targets).mean()


def cross_entropy(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    """Compute the mean over the batch of −log softmax(logits)[label]."""
    return optax.softmax_cross_entropy_with_integer_labels(_wide(logits), labels).mean()


def classification_loss(
    logits: Float[Array, "b classes"],
    target: Int[Array, " b"] | Float[Array, "b classes"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Compute the supervised loss. Integer labels are smoothed; soft targets (mixup's) are used as given."""
    if target.ndim == 2:
        return soft_target_cross_entropy(logits, target)
    if label_smoothing == 0.0:
        return cross_entropy(logits, target)
    return label_smoothing_cross_entropy(logits, target, label_smoothing)


def _wide(x: Array) -> Array:
    return x.astype(wide_dtype(x.dtype))

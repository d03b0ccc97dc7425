"""Resample feature maps by small matrices, one per axis: bilinear resizing and adaptive average pooling.

Matrix products are differentiable and run on tensor cores, and their sums are float32 or wider for every dtype. Where a
large result is only reduced over its channels, `fold_resized` and `resized_argmax` never write it to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from fastvim_jax.typing import FeatureMap
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.sharding import mark_varying

MOST_TOGETHER = 16
"""Channels that are folded in one kernel. 15 and 30 take as long; with 5 what was folded is read too often."""


def neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what each of `target` points reads in linear resampling: two places of `source`, and the second's weight.

    Pixel centres lie at half-integers, taps are clamped at the borders, and nothing is smoothed when shrinking
    (`align_corners=False`, no antialiasing).
    """
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.floor(position).astype(int)
    return low, np.minimum(low + 1, source - 1), position - low


@lru_cache(maxsize=256)
def linear_matrix(source: int, target: int) -> np.ndarray:
    """Return the weights `target source` of linear resampling along one axis; see `neighbours`."""
    low, high, weight = neighbours(source, target)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), low), 1 - weight)
    np.add.at(weights, (np.arange(target), high), weight)
    return weights


@lru_cache(maxsize=256)
def average_matrix(source: int, bins: int) -> np.ndarray:
    """Return the weights `bins source` of adaptive average pooling along one axis.

    Bin i is the mean of the entries floor(i source / bins) to ceil((i + 1) source / bins) - 1; bins may overlap.
    """
    weights = np.zeros((bins, source))
    for i in range(bins):
        start, stop = i * source // bins, -(-(i + 1) * source // bins)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


def resize_bilinear(x: FeatureMap, size: tuple[int, int]) -> FeatureMap:
    """Resize feature maps `b h w c` to `size` (height, width); see `linear_matrix`. The dtype is kept."""
    height, width = x.shape[1:3]
    if (height, width) == tuple(size):
        return x
    return apply_matrices(x, linear_matrix(height, size[0]), linear_matrix(width, size[1]))


def adaptive_average_pool(x: FeatureMap, size: tuple[int, int]) -> FeatureMap:
    """Average feature maps `b h w c` over `size` (rows, columns) of bins; see `average_matrix`."""
    height, width = x.shape[1:3]
    return apply_matrices(x, average_matrix(height, size[0]), average_matrix(width, size[1]))


def apply_matrices(
    x: FeatureMap, rows: np.ndarray | Float[Array, "m h"], columns: np.ndarray | Float[Array, "n w"]
) -> FeatureMap:
    """Apply a matrix to the rows and one to the columns of `b h w c`. Sums are held in float32 or wider."""
    y = _apply_to_rows(x, rows)
    matrix = jnp.asarray(columns, y.dtype)
    return jnp.einsum("nw,bmwc->bmnc", matrix, y, precision="highest").astype(x.dtype)


def resize_rows(x: FeatureMap, height: int) -> FeatureMap:
    """Resize the rows of `b h w c` (bilinear). The result is float32 or wider."""
    return _apply_to_rows(x, linear_matrix(x.shape[1], height))


def _apply_to_rows(x, rows):
    wide = wide_dtype(x.dtype)
    matrix = jnp.asarray(rows, wide)
    return jnp.einsum("mh,bhwc->bmwc", matrix, x.astype(wide), precision="highest")


def interpolate(
    x: Float[Array, ...],
    low: Int[Array, " n"] | np.ndarray,
    high: Int[Array, " n"] | np.ndarray,
    share: Float[Array, ...],
    *,
    axis: int,
) -> Float[Array, ...]:
    """Return, along an axis, `share` of the entries at `high` plus the rest of those at `low`; see `neighbours`."""
    return jnp.take(x, low, axis=axis) * (1 - share) + jnp.take(x, high, axis=axis) * share


def fold_resized(
    step: Callable[[Any, Any, list[Float[Array, "b h n"]]], Any],
    start: Any,
    x: FeatureMap,
    width: int,
) -> Any:
    """Resize the columns of `b h w c` to `width` (bilinear), and fold `step` over the channels of the result.

    Some channels are interpolated and folded in one kernel, so only what is folded is in memory. A reduction over the
    last axis would do the same, but takes XLA seven times as long (benchmarks/NOTES.md).

    Args:
        step: function of what was folded so far (arrays `b h width`), the number of the first channel (int32), and that
            channel and the following ones.
        start: pytree of scalar arrays, what each pixel starts from.
        x: maps whose rows are already resized, float32 or wider.
        width: columns of the result.
    """
    low, high, shares = neighbours(x.shape[2], width)
    share = jnp.asarray(shares, x.dtype)
    channels = jnp.moveaxis(x, -1, 0)
    # Of the sharding of x, and varying over the same mesh axes: a loop keeps the types of what it starts from.
    like = jnp.take(channels[0], low, axis=-1)
    start = jax.tree.map(lambda value: jnp.full_like(like, value, value.dtype), start)
    start = mark_varying(start, x)
    count = len(channels)
    several = -(-count // -(-count // MOST_TOGETHER))

    def visit(folded, first, given):
        return step(folded, first, [interpolate(each, low, high, share, axis=-1) for each in given])

    def body(carry, given):
        folded, first = carry
        return (visit(folded, first, list(given)), first + several), None

    whole = count // several * several
    parts = channels[:whole].reshape(-1, several, *channels.shape[1:])
    (folded, first), _ = lax.scan(body, (start, jnp.int32(0)), parts)
    return visit(folded, first, list(channels[whole:])) if whole < count else folded


def resized_argmax(x: FeatureMap, size: tuple[int, int]) -> Int[Array, "b height width"]:
    """Resize `b h w c` to `size` (bilinear), and return the channel of the largest value, the lowest among equals."""

    def larger(best, first, values):
        value, channel = best
        for number, other in enumerate(values):
            channel = jnp.where(other > value, first + number, channel)
            value = jnp.maximum(other, value)
        return value, channel

    rows = resize_rows(x, size[0])
    start = jnp.array(-jnp.inf, rows.dtype), jnp.int32(0)
    return fold_resized(larger, start, rows, size[1])[1]

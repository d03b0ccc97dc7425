"""Resample feature maps by small matrices, one per axis: bilinear resizing and adaptive average pooling.

Matrix products are differentiable and run on tensor cores, and their sums are float32 or wider for every dtype. Where a
large result is only reduced over its channels, `interpolate_columns` and `resized_argmax` never write it to memory.
"""

from __future__ import annotations

from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastvim_jax.typing import FeatureMap
from pallas_kernels.dtypes import wide_dtype


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
    wide = wide_dtype(x.dtype)
    matrices = [jnp.asarray(matrix, wide) for matrix in (rows, columns)]
    y = jnp.einsum("mh,bhwc->bmwc", matrices[0], x.astype(wide), precision="highest")
    return jnp.einsum("nw,bmwc->bmnc", matrices[1], y, precision="highest").astype(x.dtype)


def resize_rows(x: FeatureMap, height: int) -> FeatureMap:
    """Resize the rows of `b h w c` (bilinear). The result is float32 or wider."""
    wide = wide_dtype(x.dtype)
    matrix = jnp.asarray(linear_matrix(x.shape[1], height), wide)
    return jnp.einsum("mh,bhwc->bmwc", matrix, x.astype(wide), precision="highest")


def interpolate_columns(
    x: FeatureMap, target: int, columns: np.ndarray | slice = slice(None)
) -> Float[Array, "b h n c"]:
    """Resize the columns of `b h w c` to `target` (bilinear) as sums of two entries, and return the given ones of them.

    XLA computes such sums where they are read: a reduction over the channels writes its own result alone. The gradient
    by autodiff is a slow scatter; see `pixel_loss` for a fast one.
    """
    low, high, shares = (each[columns] for each in neighbours(x.shape[2], target))
    share = jnp.asarray(shares, x.dtype)[:, None]
    return jnp.take(x, low, axis=2) * (1 - share) + jnp.take(x, high, axis=2) * share


def resized_argmax(x: FeatureMap, size: tuple[int, int]) -> Int[Array, "b height width"]:
    """Resize `b h w c` to `size` (bilinear), and return the channel of the largest value, the lowest among equals."""
    return jnp.argmax(interpolate_columns(resize_rows(x, size[0]), size[1]), axis=-1)

"""Resample feature maps by small matrices, one per axis: bilinear resizing and adaptive average pooling.

Matrix products are differentiable and run on tensor cores, and their sums are float32 or wider for every dtype.
"""

from __future__ import annotations

from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastvim_jax.typing import FeatureMap
from pallas_kernels.dtypes import wide_dtype


@lru_cache(maxsize=256)
def linear_matrix(source: int, target: int) -> np.ndarray:
    """Return the weights `target source` of linear resampling along one axis.

    Pixel centres lie at half-integers, taps are clamped at the borders, and nothing is smoothed when shrinking
    (`align_corners=False`, no antialiasing).
    """
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, source - 1)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), low), 1 - (position - low))
    np.add.at(weights, (np.arange(target), high), position - low)
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

"""Build anchors: the boxes of fixed shape that the region proposal network scores at every cell of every level."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float


def base_anchors(
    stride: int, scale: float, ratios: tuple[float, ...]
) -> Float[np.ndarray, "ratios 4"]:
    """Return the anchors around the origin, float64: sides scale·stride/√r and scale·stride·√r, r = height/width."""
    root = np.sqrt(np.asarray(ratios, np.float64))
    half = np.stack([scale * stride / root, scale * stride * root], -1) / 2
    return np.concatenate([-half, half], -1)


def level_anchors(
    grid: tuple[int, int], stride: int, scale: float, ratios: tuple[float, ...]
) -> Float[np.ndarray, "n 4"]:
    """Return one level's anchors, float64, in the order row, column, ratio.

    They are centred on the cells' upper left corners (column·stride, row·stride), as in the reference, not on the
    cells' middles.
    """
    y, x = np.meshgrid(*(np.arange(n) * float(stride) for n in grid), indexing="ij")
    centres = np.stack([x, y, x, y], -1)[:, :, None]
    return (centres + base_anchors(stride, scale, ratios)).reshape(-1, 4)


def valid_anchors(
    grid: tuple[int, int], stride: int, padded: tuple[int, int], per_cell: int
) -> Bool[np.ndarray, " n"]:
    """Mark the anchors of cells that the padded image (height, width) reaches."""
    rows, columns = (np.arange(n) < -(-s // stride) for n, s in zip(grid, padded, strict=True))
    return np.repeat((rows[:, None] & columns[None, :]).reshape(-1), per_cell)


def inside(anchors: ArrayLike, size: ArrayLike) -> Any:
    """Mark the anchors that lie within an image of `size` (height, width): x1, y1 ≥ 0, x2 < width, y2 < height."""
    anchors, size = jnp.asarray(anchors), jnp.asarray(size)
    low = (anchors[..., 0] >= 0) & (anchors[..., 1] >= 0)
    return low & (anchors[..., 2] < size[..., 1]) & (anchors[..., 3] < size[..., 0])

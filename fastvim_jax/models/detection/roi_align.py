"""Compute RoIAlign with the reference's adaptive number of samples: exact, of fixed shape, as matrix products.

A box of w × h cells has bins of w/n × h/n cells; each bin is the mean of ceil(w/n) × ceil(h/n) bilinear samples. A
bilinear sample on a grid is separable, so the weight of cell (y, x) in bin (p, q) is `rows[p, y] · columns[q, x]`, each
the mean over its axis' samples of the hat function around the cell.

A box reads a rectangle of cells. Its sides are unbounded (a box can be as wide as the image and one cell high) but its
number of cells is not: the level rule sends a box to a level where it covers fewer than 28² cells, and the last level
is small. So every box gathers the same static number of cells, `cell_bound`, from one table of all levels, and
multiplies them by its weights: no box is cut, resampled or sorted by size.

On GPUs a kernel reads only the cells that a bin touches, and writes none of them. Gradients are those of the gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastvim_jax.models.detection.boxes import sides
from pallas_kernels import gpu
from pallas_kernels.sharding import on_cuda, per_shard
from pallas_kernels.trial import Trial

BASE_SIZE = 56
"""Pixels. Square boxes with sides from 2^k times this read level k (from 0)."""


def box_levels(boxes: Float[Array, "*n 4"], levels: int) -> Int[Array, "*n"]:
    """Choose a pyramid level by a box's size: floor(log2(√(w·h) / 56 + 1e-6)), between 0 and `levels` - 1."""
    width, height = sides(boxes)
    size = jnp.sqrt(jnp.maximum(width * height, 0))
    level = jnp.floor(jnp.log2(size / BASE_SIZE + 1e-6))
    return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


def cell_bound(
    grids: Sequence[tuple[int, int]], strides: Sequence[int], levelled: bool = True
) -> int:
    """Return how many cells a box can read at most, whatever its shape.

    Args:
        grids: Rows and columns of each level.
        strides: Pixels of a cell of each level.
        levelled: Whether every box reads the level that `box_levels` gives. Otherwise any box may read any level.
    """
    bound = 1
    for level, ((rows, columns), stride) in enumerate(zip(grids, strides, strict=True)):
        if not levelled or level == len(grids) - 1:
            bound = max(bound, rows * columns)
            continue
        # A box of h cells reads at most ceil(h) + 2 of them along an axis, and h · w < area.
        area = (2 ** (level + 1) * BASE_SIZE / stride) ** 2
        height = np.arange(1, rows + 1)
        width = np.ceil(area / np.maximum(height - 3, 1e-9)) + 2
        bound = max(bound, int(np.max(height * np.minimum(width, columns))))
    return min(bound, max(rows * columns for rows, columns in grids))


def pool_boxes(
    levels: Sequence[Float[Array, "b _h _w c"]],
    boxes: Float[Array, "b n 4"],
    *,
    strides: Sequence[int],
    size: tuple[int, int],
) -> Float[Array, "b n p q c"]:
    """Apply `roi_align` to the boxes of every image, each at the level that `box_levels` gives.

    Programs for Hopper and newer GPUs hold a kernel for maps of a multiple of 128 channels, at most 1,024. It keeps the
    weights in float32, where XLA's form rounds them to the dtype of the maps. Gradients are XLA's.

    Args:
        levels: feature maps of a batch of images.
        boxes: in pixels of the padded images.
        strides: pixels of a cell of each map.
        size: bins along height and width.
    """
    levels = tuple(levels)
    cells = cell_bound([(x.shape[1], x.shape[2]) for x in levels], strides)
    by_gather: Any = partial(_pool_by_gather, strides=tuple(strides), size=size, cells=cells)
    if not boxes.size or _kernel_unsupported(levels, boxes, strides, size) is not None:
        return by_gather(levels, boxes)
    by_kernel = partial(_pool_by_kernel, strides=tuple(strides), size=size)

    def on_share(_, levels, boxes):
        return on_cuda(by_kernel, by_gather, levels, boxes)

    maps = tuple(f"b h{i} w{i} c" for i in range(len(levels)))
    run = per_shard(on_share, (maps, "b n corner"), "b n p q c", split="b", opaque=True)
    pool = jax.custom_vjp(run)
    pool.defvjp(
        lambda *given: (run(*given), given),
        lambda given, gradient: jax.vjp(by_gather, *given)[1](gradient),
    )
    return pool(levels, boxes)


def _pool_by_gather(levels, boxes, *, strides, size, cells):
    # Save nothing for the backward pass: the gathered cells are large, and cheap to gather again.
    @jax.checkpoint
    def one(levels, boxes):
        level = box_levels(boxes, len(levels))
        return roi_align(levels, boxes, level, strides=strides, size=size, cells=cells)

    return jax.vmap(one)(levels, boxes)


def _kernel_unsupported(levels, boxes, strides, size) -> str | None:
    missing = gpu.kernels_missing()
    if missing is not None:
        return missing
    from pallas_kernels.roi_align import mosaic

    reason = mosaic.unsupported(levels[0].shape[-1], levels[0].dtype)
    if reason is None:
        run = partial(_pool_by_kernel, strides=tuple(strides), size=size)
        trial = Trial(lambda *given: run(*jax.lax.stop_gradient(given)), (levels, boxes), size)
        reason = gpu.trial_failure("roi_align", trial)
    if reason is not None:
        gpu.log_once(f"roi_align: using XLA and not the GPU kernel, since {reason}")
    return reason


def _pool_by_kernel(levels, boxes, *, strides, size):
    from pallas_kernels.roi_align import mosaic

    boxes = boxes.astype(jnp.float32)
    shapes = np.array([feature.shape[1:3] for feature in levels])
    starts = np.concatenate([[0], np.cumsum(shapes.prod(1))])
    table = jnp.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in levels], axis=1)
    level = box_levels(boxes, len(levels))
    grid = [_of_level(sides, level) for sides in shapes.T]
    scaled = boxes / _of_level(strides, level)[..., None] - 0.5
    ends, weights, ranges = [], [], []
    for axis, bins in enumerate(size):
        one = partial(_axis_of_box, bins=bins, longest=int(shapes[:, axis].max()))
        of_boxes = jax.vmap(jax.vmap(one))
        first, weight, span = of_boxes(scaled[..., 1 - axis], scaled[..., 3 - axis], grid[axis])
        ends.append(first)
        weights.append(weight)
        ranges.append(span)
    first = _of_level(starts, level) + ends[0] * grid[1] + ends[1]
    return mosaic.sum_cells(table, first, grid[1], *weights, *ranges, interpret=gpu.interpreted())


def _axis_of_box(low, high, limit, *, bins, longest):
    """Return the first cell that a box reads along an axis, its bins' weights of that and the following cells, and the
    bins' ranges of cells beside the first (first, and one behind the last).
    """
    first = jnp.clip(jnp.floor(low), 0, limit - 1).astype(jnp.int32)
    count = jnp.ceil((high - low) / bins)
    cells = first + jnp.arange(longest, dtype=jnp.int32)
    edges = low + (high - low) / bins * jnp.arange(bins + 1, dtype=low.dtype)
    # One cell more than the samples read, so that rounding of the edges loses none.
    # Clipped as integers, so that a box that is not finite reads cells of its map, too.
    floor = lambda x: jnp.floor(x).astype(jnp.int32)  # noqa: E731
    begin = jnp.clip(floor(edges[:-1]), first, limit - 1) - first
    end = jnp.clip(floor(edges[1:]) + 2, first + 1, limit) - first
    weights = axis_weights(cells, low, high, count, limit, bins)
    at = jnp.arange(longest)
    inside = (at >= begin[:, None]) & (at < end[:, None])
    return first, jnp.where(inside, weights, 0), (begin, end)


def roi_align(
    levels: Sequence[Float[Array, "_h _w c"]],
    boxes: Float[Array, "n 4"],
    level: Int[Array, " n"],
    *,
    strides: Sequence[int],
    size: tuple[int, int],
    cells: int,
    ratio: int = 0,
) -> Float[Array, "n p q c"]:
    """Average the features inside each bin of each box. No gradient flows to the boxes.

    Args:
        levels: Feature maps of one image.
        boxes: In pixels of the image.
        level: The map each box reads.
        strides: Pixels of a cell of each map.
        size: Bins along height and width.
        cells: Cells gathered per box, from `cell_bound`. A box that needs more loses those at its bottom.
        ratio: Samples along each side of a bin; 0: ceil(side / bins), the reference's setting.

    Returns:
        Features of every box, in the dtype of the maps. A box without area gives zeros at ratio 0.
    """
    boxes = jax.lax.stop_gradient(boxes)
    shapes = np.array([feature.shape[:2] for feature in levels])
    starts = np.concatenate([[0], np.cumsum(shapes.prod(1))])[:-1]
    table = jnp.concatenate([feature.reshape(-1, feature.shape[-1]) for feature in levels])
    grid = jnp.stack([_of_level(sides, level) for sides in shapes.T], axis=-1)
    scaled = boxes / _of_level(strides, level)[:, None] - 0.5
    weights, index = jax.vmap(lambda box, grid: _cell_weights(box, grid, size, cells, ratio))(
        scaled, grid
    )
    index = jnp.where(index < 0, len(table), _of_level(starts, level)[:, None] + index)
    gathered = _take(table, index)
    precision = jax.lax.Precision.HIGHEST if table.dtype != jnp.bfloat16 else None
    pooled = jnp.einsum(
        "nkm,nmc->nkc",
        weights.astype(table.dtype),
        gathered,
        precision=precision,
        preferred_element_type=jnp.promote_types(table.dtype, jnp.float32),
    )
    return pooled.astype(table.dtype).reshape(len(boxes), *size, table.shape[-1])


def _of_level(values: Sequence[int] | np.ndarray, level: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """Look up a level's number. Not in an array, because operations that XLA's partitioner splits hold no constants."""
    found = jnp.full_like(level, int(values[0]))
    for number, value in enumerate(values[1:], start=1):
        found = jnp.where(level == number, int(value), found)
    return found


@jax.custom_vjp
def _take(table: Float[Array, "cells c"], index: Int[Array, "n m"]) -> Float[Array, "n m c"]:
    """Return rows of `table`. An index behind the last row reads the last row, and no gradient flows to it.

    Gradients are added up in float32 or wider, because hundreds of boxes may read a cell.
    """
    return table.at[index].get(mode="clip")


def _take_forward(table, index):
    return _take(table, index), (index, jnp.zeros((len(table), 0), table.dtype))


def _take_backward(saved, gradient):
    index, like = saved
    wide = jnp.promote_types(like.dtype, jnp.float32)
    total = jnp.zeros((len(like), gradient.shape[-1]), wide)
    return total.at[index].add(gradient.astype(wide), mode="drop").astype(like.dtype), None


_take.defvjp(_take_forward, _take_backward)


def _cell_weights(box, grid, size, cells, ratio):
    """Return the weights `bins cells` of the cells that one box reads, and their indices in its map, row by row.

    A box that reads fewer than `cells` is filled up with weights of 0 and indices of -1, to which no gradient flows.
    Otherwise all boxes would add zeros to the same cell, one after the other.
    """
    axes = []
    for axis, bins in enumerate(size):
        low, high = box[1 - axis], box[3 - axis]
        limit = grid[axis]
        # First and last cell that any sample can touch, clamped to the map as the samples are.
        first = jnp.clip(jnp.floor(low), 0, limit - 1).astype(jnp.int32)
        last = jnp.clip(jnp.floor(high) + 1, 0, limit - 1).astype(jnp.int32)
        count = jnp.asarray(ratio or jnp.ceil((high - low) / bins), low.dtype)
        axes.append((first, last - first + 1, (low, high, count, limit, bins)))
    (top, height, along_y), (left, width, along_x) = axes
    place = jnp.arange(cells)
    used = place < height * width
    y, x = top + place // width, left + place % width
    weights = axis_weights(y, *along_y)[:, None] * axis_weights(x, *along_x)[None, :]
    return (
        jnp.where(used, weights.reshape(-1, cells), 0),
        jnp.where(used, y * grid[1] + x, -1).astype(jnp.int32),
    )


def axis_weights(
    cell: Int[Array, " n"],
    low: Float[Array, ""],
    high: Float[Array, ""],
    count: Float[Array, ""],
    limit: Int[Array, ""],
    bins: int,
) -> Float[Array, "bins n"]:
    """Weigh cells along one axis: the mean over a bin's samples of the hat function around the cell.

    The samples of a bin are evenly spaced, so the mean of those between two cells is the middle of the first and the
    last one. This needs no loop over samples. Samples below -1 or above `limit` are ignored, others are clamped to the
    cells.

    Args:
        cell: Cells, numbers from 0 to `limit` - 1; cell i lies at i.
        low: Start of the box.
        high: End of the box.
        count: Samples of a bin; 0 gives weights of 0.
        limit: Cells of the map along this axis.
        bins: Number of bins.
    """
    start = low + (high - low) / bins * jnp.arange(bins, dtype=low.dtype)[:, None]
    step = (high - low) / bins / jnp.maximum(count, 1)
    at = lambda i: start + (i + 0.5) * step  # noqa: E731

    def below(place, inclusive=False):
        """Count a bin's samples below `place`: estimate by division, then correct the rounding error."""
        i = jnp.clip(jnp.ceil((place - start) / jnp.maximum(step, 1e-30) - 0.5), 0, count)
        i = jnp.where((i > 0) & (at(i - 1) >= place), i - 1, i)
        i = jnp.where((i < count) & (at(i) < place), i + 1, i)
        return jnp.where(inclusive & (i < count) & (at(i) == place), i + 1, i)

    c = cell.astype(low.dtype)
    edge = cell == limit - 1
    before, here, after = below(c - 1), below(c), below(c + 1, edge)
    rising = jnp.where(cell == 0, 1, at((before + here - 1) / 2) - (c - 1))
    falling = jnp.where(edge, 1, (c + 1) - at((here + after - 1) / 2))
    total = (here - before) * rising + (after - here) * falling
    return jnp.where(count > 0, total / jnp.maximum(count, 1), 0)

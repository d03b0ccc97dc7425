"""RoIAlign's kernel: interpreted against float64 and against the gather, its gradients, and lowered for an H100."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.models.detection import roi_align
from pallas_kernels.roi_align import mosaic
from tests.models.test_detection import extreme_boxes
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)

pytestmark = needs_mosaic
STRIDES = (4, 8, 16)


def draw(rng, dtype="float32", channels=128, boxes=4):
    """Draw pyramids of two images of 64 x 96 pixels, and boxes of all levels in and around them."""
    maps = tuple(
        jnp.asarray(rng.standard_normal((2, 64 // s, 96 // s, channels)), dtype) for s in STRIDES
    )
    found = np.stack([extreme_boxes(rng, 8)[-boxes:] / 3 for _ in range(2)])
    found[0, :2] = [[5, 5, 5, 5], [-30, -20, 10, 90]]  # without area; larger than the image
    found[1, :2] = [[-20, -9, 99, 120], [-70, -90, 190, 150]]  # the second and third level
    return maps, jnp.asarray(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_cells(rng, dtype):
    """Compare the kernel with its definition; some bins are empty, and the last cells of the table are read."""
    n, (p, height), (q, width) = (2, 2), (2, 6), (3, 9)
    table = jnp.asarray(rng.standard_normal((2, 90, 256)), dtype)
    stride = rng.integers(width, width + 4, n).astype(np.int32)
    first = (90 - (height - 1) * stride - width).astype(np.int32)
    weights, ranges = [], []
    for bins, length in ((p, height), (q, width)):
        begin = rng.integers(0, length, (*n, bins))
        end = begin + rng.integers(0, length + 1 - begin)
        begin[0, 0, 0], end[0, 0, 0] = 0, length
        at = np.arange(length)
        inside = (at >= begin[..., None]) & (at < end[..., None])
        weights.append(np.where(inside, rng.standard_normal(inside.shape), 0).astype(np.float32))
        ranges.append((begin.astype(np.int32), end.astype(np.int32)))
    with interpreted():
        found = mosaic.sum_cells(
            table, *jax.tree.map(jnp.asarray, (first, stride, *weights, *ranges)), interpret=True
        )
    first, stride = first[..., None, None], stride[..., None, None]
    cells = first + np.arange(height)[:, None] * stride + np.arange(width)
    read = np.asarray(table, np.float64)[np.arange(2)[:, None, None, None], cells]
    wanted = np.einsum("bnpy,bnqx,bnyxc->bnpqc", *weights, read)
    assert max(relative_errors(found, wanted)) < (1e-6 if dtype == "float32" else 4e-3)


def test_boxes_of_every_kind(rng):
    maps, boxes = draw(rng)
    assert np.unique(roi_align.box_levels(boxes, 3)).tolist() == [0, 1, 2]
    options = {"strides": STRIDES, "size": (3, 2)}
    with interpreted():
        found = roi_align._pool_by_kernel(maps, boxes, **options)
    wanted = roi_align._pool_by_gather(maps, boxes, **options, cells=16 * 24)
    assert max(relative_errors(found, wanted)) < 1e-6


@pytest.mark.parametrize(
    ("channels", "dtype", "kernels"),
    [(256, "bfloat16", 1), (128, "float32", 1), (192, "bfloat16", 0)],
)
def test_what_runs_as_a_kernel(rng, channels, dtype, kernels):
    given = draw(rng, dtype, channels)
    pool = partial(roi_align.pool_boxes, strides=STRIDES, size=(7, 7))
    assert launches(lower_for_h100(pool, *given), "roi_align") == kernels
    step = jax.grad(lambda maps, boxes: jnp.sum(jnp.cos(pool(maps, boxes))))
    assert launches(lower_for_h100(step, *given), "roi_align") == kernels


def test_values_and_gradients_as_traced_for_a_gpu(rng):
    """Run on this CPU, where XLA takes the kernel's place, and compare with the gather's."""
    maps, boxes = draw(rng)

    def value_and_gradient(pool, maps):
        out, pull = jax.vjp(lambda maps: pool(maps, boxes), maps)
        return out, pull(jnp.cos(out))

    pool = partial(roi_align.pool_boxes, strides=STRIDES, size=(3, 3))
    with abstract_h100():
        found = jax.jit(partial(value_and_gradient, pool)).trace(maps).lower().compile()(maps)
    gather = partial(roi_align._pool_by_gather, strides=STRIDES, size=(3, 3), cells=16 * 24)
    wanted = jax.jit(partial(value_and_gradient, gather))(maps)
    assert max(relative_errors(found, wanted)) < 1e-6


def test_boxes_that_are_not_finite_read_no_cell_outside_their_map(rng):
    """Give the kernel boxes of a run that diverged. The interpreter refuses reads outside of an array."""
    maps, _ = draw(rng)
    inf, nan = np.inf, np.nan
    boxes = [[50, 20, inf, 30], [-inf, -inf, inf, inf], [20, nan, 40, 30], [nan] * 4]
    boxes = jnp.asarray([boxes, [[3e9, 3e9, 4e9, 4e9]] * 4], jnp.float32)
    with interpreted():
        found = roi_align._pool_by_kernel(maps, boxes, strides=STRIDES, size=(2, 2))
    assert found.shape == (2, 4, 2, 2, 128)


def test_nan_stays_in_its_image(rng):
    """Read the last cells of an image, behind which the next one's begin."""
    maps, _ = draw(rng)
    maps = tuple(x.at[1].set(jnp.nan) for x in maps)
    boxes = jnp.asarray([[[0, 0, 240, 240]]] * 2, jnp.float32)
    options = {"strides": STRIDES, "size": (2, 2)}
    with interpreted():
        found = roi_align._pool_by_kernel(maps, boxes, **options)
    wanted = roi_align._pool_by_gather(maps, boxes, **options, cells=16 * 24)
    assert np.isnan(found[1]).any() and max(relative_errors(found[:1], wanted[:1])) < 1e-6


def test_no_boxes(rng):
    maps, _ = draw(rng)
    pool = partial(roi_align.pool_boxes, strides=STRIDES, size=(7, 7))
    boxes = jnp.zeros((2, 0, 4))
    assert pool(maps, boxes).shape == (2, 0, 7, 7, 128)
    assert launches(lower_for_h100(pool, maps, boxes), "roi_align") == 0

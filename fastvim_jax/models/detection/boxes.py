"""Compute with boxes (x1, y1, x2, y2): overlap, deltas, clipping.

Coordinates are continuous, in pixels: a box's width is x2 - x1, without the + 1 of older detectors. The deltas from a
box p to a target g, before they are divided by `stds`, are

    ((gx - px) / pw, (gy - py) / ph, log(gw / pw), log(gh / ph)),   x, y the centres
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Boxes = Float[Array, "*n 4"]
Stds = tuple[float, float, float, float]

MAX_LOG_RATIO = abs(math.log(16 / 1000))
"""Bound on the decoded log ratio of sides: exp would overflow on the deltas of an untrained model."""


def sides(boxes: Boxes) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Return widths and heights."""
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def not_empty(boxes: Boxes) -> Bool[Array, "*n"]:
    """Mark the boxes whose width and height are positive."""
    width, height = sides(boxes)
    return (width > 0) & (height > 0)


def overlaps(
    a: Float[Array, "*b n 4"],
    b: Float[Array, "*b m 4"],
    kind: Literal["iou", "iof", "giou"] = "iou",
) -> Float[Array, "*b n m"]:
    """Compute the overlap of every box of `a` with every box of `b`.

    Args:
        a: Boxes.
        b: Boxes.
        kind: iou: intersection over union; iof: intersection over the area of `a`; giou: iou minus the share of the
            enclosing box that the union leaves free. Divisors are at least 1e-6: a box without area overlaps nothing.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    shared = _product(jnp.maximum(high - low, 0))
    area_a, area_b = _product(a[..., 2:] - a[..., :2]), _product(b[..., 2:] - b[..., :2])
    whole = area_a if kind == "iof" else area_a + area_b - shared
    whole = jnp.maximum(whole, 1e-6)
    if kind != "giou":
        return shared / whole
    corners = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
    enclosing = jnp.maximum(_product(jnp.maximum(corners[1] - corners[0], 0)), 1e-6)
    return shared / whole - (enclosing - whole) / enclosing


def _product(sides: Float[Array, "*b 2"]) -> Float[Array, "*b"]:
    """Multiply width by height. XLA folds a reduction over constant anchors slowly, a product at once."""
    return sides[..., 0] * sides[..., 1]


def encode_deltas(boxes: Boxes, targets: Boxes, stds: Stds) -> Boxes:
    """Express `targets` relative to `boxes`. Boxes without area give no finite deltas."""
    (w, h), (gw, gh) = sides(boxes), sides(targets)
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    target_centre = (targets[..., :2] + targets[..., 2:]) / 2
    size = jnp.stack([w, h], -1)
    ratio = jnp.stack([gw, gh], -1) / size
    deltas = jnp.concatenate([(target_centre - centre) / size, jnp.log(ratio)], -1)
    return deltas / jnp.asarray(stds, deltas.dtype)


def decode_deltas(
    boxes: Boxes, deltas: Boxes, stds: Stds, size: Float[Array, "*b 2"] | None = None
) -> Boxes:
    """Apply deltas to boxes (the inverse of `encode_deltas`), then clip the corners.

    The logarithms of the side ratios are clamped to `MAX_LOG_RATIO`. Where a value is clamped or clipped its gradient
    is 0.

    Args:
        boxes: The boxes the deltas refer to.
        deltas: Of the shape of `boxes`.
        stds: What `encode_deltas` divided by.
        size: Height and width to clip to, broadcast against the leading axes of `boxes`; None: do not clip.
    """
    deltas = deltas * jnp.asarray(stds, deltas.dtype)
    w, h = sides(boxes)
    old = jnp.stack([w, h], -1)
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2 + deltas[..., :2] * old
    half = old * jnp.exp(_clamp(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO)) / 2
    decoded = jnp.concatenate([centre - half, centre + half], -1)
    return decoded if size is None else clip_boxes(decoded, size)


def clip_boxes(boxes: Boxes, size: Float[Array, "*b 2"]) -> Boxes:
    """Clip the corners to an image of `size` (height, width), broadcast against the leading axes of `boxes`."""
    height, width = size[..., 0], size[..., 1]
    return _clamp(boxes, 0.0, jnp.stack([width, height, width, height], -1))


def _clamp(x, low, high):
    # jnp.clip splits the gradient at the bounds; here a value at its bound keeps it whole.
    outside = (x < low) | (x > high)
    return jnp.where(outside, jax.lax.stop_gradient(jnp.clip(x, low, high)), x)

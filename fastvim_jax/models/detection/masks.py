"""Make training targets of 28 × 28 from packed masks of objects, and paste predicted masks back into an image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from fastvim_jax.models.detection.boxes import clip_boxes
from fastvim_jax.models.detection.roi_align import axis_weights

TARGET_SIZE = 28


def mask_targets(
    masks: UInt8[Array, "m h w8"],
    width: int,
    boxes: Float[Array, "n 4"],
    objects: Int[Array, " n"],
    *,
    size: int = TARGET_SIZE,
) -> Float[Array, "n size size"]:
    """Average each object's mask inside the bins of its box, as RoIAlign with adaptive samples does.

    The caller compares the averages with 0.5 to get the targets.

    Args:
        masks: Masks of whole images. They are large, so `numpy.packbits` has packed eight pixels of a row into a byte.
        width: Pixels of a row. The last byte of a row may hold fewer than eight.
        boxes: Boxes; they are clipped to the image here.
        objects: Index of the mask that each box reads.
        size: Bins along each side.
    """
    height = masks.shape[1]
    boxes = clip_boxes(boxes, jnp.asarray([height, width], boxes.dtype)) - 0.5
    dtype = boxes.dtype

    def one(item):
        box, index = item
        bits = jnp.unpackbits(masks[index], axis=-1, count=width).astype(dtype)
        rows, columns = (
            axis_weights(
                jnp.arange(limit),
                box[low],
                box[low + 2],
                jnp.ceil((box[low + 2] - box[low]) / size),
                jnp.asarray(limit),
                size,
            )
            for low, limit in ((1, height), (0, width))
        )
        exact = jax.lax.Precision.HIGHEST
        return jnp.matmul(jnp.matmul(rows, bits, precision=exact), columns.T, precision=exact)

    # Work on a few boxes at a time, because the unpacked masks of a batch would fill a GPU.
    return jax.lax.map(one, (boxes, objects), batch_size=min(16, max(len(boxes), 1)))


def paste_mask(
    probability: Float[np.ndarray, "n n"], box: Float[np.ndarray, " 4"], height: int, width: int
) -> Float[np.ndarray, "height width"]:
    """Sample a predicted mask at the pixels of an image, on the host: bilinear inside its box, zero outside.

    Pixel p reads the mask at (p + 0.5 - x0) / (x1 - x0) · n - 0.5, counted in cells.
    """
    n = len(probability)
    weights = []
    for low, high, pixels in ((box[1], box[3], height), (box[0], box[2], width)):
        with np.errstate(divide="ignore", invalid="ignore"):
            at = (np.arange(pixels) + 0.5 - low) / (high - low) * n - 0.5
        hat = np.maximum(1 - np.abs(at[:, None] - np.arange(n)), 0)
        weights.append(np.nan_to_num(hat))
    return weights[0] @ probability @ weights[1].T


def paste_masks(
    probabilities: Float[np.ndarray, "k n n"],
    boxes: Float[np.ndarray, "k 4"],
    height: int,
    width: int,
    threshold: float = 0.5,
) -> Bool[np.ndarray, "k height width"]:
    """Paste every mask and compare it with `threshold`; computed inside the box only."""
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, probability, box in zip(masks, probabilities, boxes, strict=True):
        # A pixel whose centre lies up to half a mask cell outside the box still sees the mask's border.
        border = (box[2:] - box[:2]) / (2 * len(probability)) + 1
        low = np.maximum(np.floor(box[:2] - border), 0).astype(int)
        high = np.minimum(np.ceil(box[2:] + border), (width, height)).astype(int)
        if (high > low).all():
            shifted = box - np.tile(low, 2)
            values = paste_mask(probability, shifted, *(int(n) for n in (high - low)[::-1]))
            mask[low[1] : high[1], low[0] : high[0]] = values >= threshold
    return masks

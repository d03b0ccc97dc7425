"""Warp batches of uint8 images by affine maps, as Pillow's `Image.transform` with bicubic resampling does.

Pillow takes output pixel (x, y) from the place (a x' + b y' + c, d x' + e y' + f) of the input, where x' = x + 1/2 and
y' = y + 1/2. A place outside the image gets the fill colour. Elsewhere, a cubic through 4 x 4 pixels (Keys' kernel with
a = -1, the border repeated) is clipped and cut to 8 bits. This file computes in float32 and Pillow in float64, so a
value may differ by one level.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt32

from fastvim_jax.data.randaugment import FILL, FILL_GREY, GEOMETRIC, MAX_LEVEL


def matrices(
    kind: Int[Array, " b"], level: Float[Array, " b"], size: tuple[int, int]
) -> Float[Array, "b 6"]:
    """Compute the matrix (a, b, c, d, e, f) of each image's operation.

    Args:
        kind: index of the operation in `GEOMETRIC`; any other number gives the identity.
        level: its level, with a sign; see `randaugment.OPERATIONS`.
        size: height and width.
    """
    height, width = size
    share = level / MAX_LEVEL
    angle = -share * np.float32(np.deg2rad(30))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    one, zero = jnp.ones_like(level), jnp.zeros_like(level)
    found = {
        "rotate": (
            cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y
        ),
        "shear_x": (one, share * 0.3, zero, zero, one, zero),
        "shear_y": (one, zero, zero, share * 0.3, one, zero),
        "translate_x": (one, zero, share * 0.45 * width, zero, one, zero),
        "translate_y": (one, zero, zero, zero, one, share * 0.45 * height),
    }  # fmt: skip
    identity = jnp.stack([one, zero, zero, zero, one, zero], -1)
    chosen = [(kind == i)[:, None] for i in range(len(GEOMETRIC))]
    return jnp.select(chosen, [jnp.stack(found[name], -1) for name in GEOMETRIC], identity)


def warp(images: UInt8[Array, "b h w c"], matrix: Float[Array, "b 6"]) -> UInt8[Array, "b h w c"]:
    """Warp each image by its matrix. Places outside of the image get RandAugment's fill colour.

    A pixel's channels are packed into one 32-bit word, so that a pixel of the result reads 16 words.
    """
    channels = images.shape[-1]
    warped = jax.vmap(lambda image, row: _warp_words(image, row, channels))(_packed(images), matrix)
    return jnp.stack([(warped >> 8 * c) & 0xFF for c in range(channels)], -1).astype(jnp.uint8)


def _packed(images: UInt8[Array, "b h w c"]) -> UInt32[Array, "b h w"]:
    words = images.astype(jnp.uint32)
    packed = words[..., 0]
    for c in range(1, images.shape[-1]):
        packed |= words[..., c] << 8 * c
    return packed


def _warp_words(
    image: UInt32[Array, "h w"], matrix: Float[Array, 6], channels: int
) -> UInt32[Array, "h w"]:
    height, width = image.shape
    y, x = jnp.arange(height)[:, None] + 0.5, jnp.arange(width)[None] + 0.5
    from_x = matrix[0] * x + matrix[1] * y + matrix[2]
    from_y = matrix[3] * x + matrix[4] * y + matrix[5]
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    from_x, from_y = from_x - 0.5, from_y - 0.5
    left, top = jnp.floor(from_x), jnp.floor(from_y)
    right_share, low_share = from_x - left, from_y - top
    columns = [jnp.clip(left.astype(jnp.int32) + i, 0, width - 1) for i in range(-1, 3)]
    rows = [jnp.clip(top.astype(jnp.int32) + i, 0, height - 1) * width for i in range(-1, 3)]
    flat = image.reshape(-1)
    words = [
        [flat.at[row + column].get(mode="promise_in_bounds") for column in columns] for row in rows
    ]
    fill = FILL if channels == 3 else (FILL_GREY,)
    result = jnp.zeros((height, width), jnp.uint32)
    for c in range(channels):
        values = [[((word >> 8 * c) & 0xFF).astype(jnp.float32) for word in row] for row in words]
        value = _cubic([_cubic(row, right_share) for row in values], low_share)
        level = jnp.where(inside, jnp.clip(value, 0, 255).astype(jnp.uint32), fill[c])
        result |= level << 8 * c
    return result


def _cubic(values: list[Array], at: Array) -> Array:
    """Evaluate Pillow's cubic through four neighbours, `at` of the way from the second to the third."""
    a, b, c, d = values
    return b + at * ((c - a) + at * ((2 * (a - b) + c - d) + at * (b - a - c + d)))

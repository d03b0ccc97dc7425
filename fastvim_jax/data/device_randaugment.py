"""RandAugment and colour jitter on batches of uint8 images inside the jitted step, by the numbers that the host drew.

The operations are those of `randaugment`, held to Pillow: the ones by histogram or table exactly, but for
auto_contrast; that one, and those that blend or move, within one level. A branch for each image would compute all 15
for every image. So a layer makes three passes instead: every image through one table of 256 entries per channel (six
operations), every image blended with one other (four), every image moved by one matrix (five), and each keeps the
result that its operation asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from fastvim_jax.data.device_warp import matrices, warp
from fastvim_jax.data.per_device import on_each_device
from fastvim_jax.data.randaugment import GEOMETRIC, JITTERED, MAX_LEVEL, NAMES

LOOKED_UP = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
BLENDED = ("brightness", "contrast", "colour", "sharpness")

_LUMA = (19595, 38470, 7471)  # of 65536: Pillow's greyscale


def augment_drawn(images: UInt8[Array, "b h w c"], drawn: Mapping[str, Any]) -> Array:
    """Flip, RandAugment and jitter each image as `drawn` says; see `augment.draw_augmentation`.

    Under an ambient mesh every device works on its own images.
    """
    if "flip" in drawn:
        images = jnp.where(drawn["flip"][:, None, None, None], images[:, :, ::-1], images)
    if "operation" in drawn:
        images = on_each_device(rand_augment, images, drawn["operation"], drawn["level"])
    if "jitter" in drawn:
        images = on_each_device(colour_jitter, images, drawn["jitter"], drawn["factor"])
    return images


def rand_augment(
    images: UInt8[Array, "b h w c"],
    operation: Int32[Array, "b layers"],
    level: Float[Array, "b layers"],
) -> UInt8[Array, "b h w c"]:
    """Apply to each image its operations (numbers in `randaugment.NAMES`, or `NOTHING`), one layer after the other."""
    for layer in range(operation.shape[1]):
        images = apply_operation(images, operation[:, layer], level[:, layer])
    return images


def apply_operation(
    images: UInt8[Array, "b h w c"], operation: Int[Array, " b"], level: Float[Array, " b"]
) -> UInt8[Array, "b h w c"]:
    """Apply one operation to each image at its own level."""
    looked = look_up(images, tables(images, _number_in(LOOKED_UP, operation), level))
    factor = jnp.maximum(0.1, 1 + level / MAX_LEVEL * 0.9)
    blended = blend(images, _number_in(BLENDED, operation), factor)
    moves = _number_in(GEOMETRIC, operation)
    moved = warp(images, matrices(moves, level, (images.shape[1], images.shape[2])))
    blends = (_number_in(BLENDED, operation) >= 0)[:, None, None, None]
    return jnp.where((moves >= 0)[:, None, None, None], moved, jnp.where(blends, blended, looked))


def colour_jitter(
    images: UInt8[Array, "b h w c"], kind: Int32[Array, "b 3"], factor: Float[Array, "b 3"]
) -> UInt8[Array, "b h w c"]:
    """Change brightness, contrast and saturation of each image in its order (numbers in `JITTERED`), by its factors."""
    numbers = jnp.asarray([BLENDED.index(name) for name in JITTERED])
    for i in range(kind.shape[1]):
        images = blend(images, numbers[kind[:, i]], factor[:, i])
    return images


def tables(
    images: UInt8[Array, "b h w c"], kind: Int[Array, " b"], level: Float[Array, " b"]
) -> UInt8[Array, "b c 256"]:
    """Build the table of each image and channel for its operation of `LOOKED_UP`; any other number: the identity."""
    value = jnp.arange(256, dtype=jnp.int32)
    low = images.min((1, 2)).astype(jnp.int32)[..., None]
    high = images.max((1, 2)).astype(jnp.int32)[..., None]
    several = high > low
    share = (level / MAX_LEVEL)[:, None, None]
    threshold = 256 - (share * 256).astype(jnp.int32)
    bits = 8 - (4 - (share * 4).astype(jnp.int32))
    found = {
        "auto_contrast": jnp.where(
            several, (value - low) * 255 // jnp.maximum(high - low, 1), value
        ),
        "equalize": _equalized(images, kind == LOOKED_UP.index("equalize"), high, several),
        "invert": 255 - value,
        "posterize": value >> bits << bits,
        "solarize": jnp.where(value < threshold, value, 255 - value),
        "solarize_add": jnp.where(value < 128, value + (share * 110).astype(jnp.int32), value),
    }
    shape = (len(images), images.shape[-1], 256)
    chosen = [jnp.broadcast_to((kind == i)[:, None, None], shape) for i in range(len(LOOKED_UP))]
    choices = [jnp.broadcast_to(found[name], shape) for name in LOOKED_UP]
    return jnp.clip(jnp.select(chosen, choices, value), 0, 255).astype(jnp.uint8)


def look_up(
    images: UInt8[Array, "b h w c"], table: UInt8[Array, "b c 256"]
) -> UInt8[Array, "b h w c"]:
    """Replace each value by its table's entry."""
    offset = 256 * jnp.arange(images.shape[-1])

    def one(image: Array, entries: Array) -> Array:
        return (
            entries.reshape(-1).at[image.astype(jnp.int32) + offset].get(mode="promise_in_bounds")
        )

    return jax.vmap(one)(images, table)


def blend(
    images: UInt8[Array, "b h w c"], kind: Int[Array, " b"], factor: Float[Array, " b"]
) -> UInt8[Array, "b h w c"]:
    """Blend each image with its degenerate form by `factor`, cut to 8 bits, as Pillow's `Image.blend` does.

    The degenerate form of `BLENDED[kind]`: black, the mean of the greyscale image, the greyscale image, the smoothed
    image.
    """
    wide = images.astype(jnp.int32)
    grey = _grey(wide)
    count = images.shape[1] * images.shape[2]
    mean = (2 * grey.sum((1, 2, 3), keepdims=True) + count) // (2 * count)
    which = kind[:, None, None, None]
    other = jnp.select(
        [which == 1, which == 2, which == 3], [mean, grey, _smoothed(wide)], jnp.zeros_like(grey)
    )
    value = other.astype(jnp.float32) + factor[:, None, None, None] * (wide - other)
    return jnp.clip(value, 0, 255).astype(jnp.uint8)


def _equalized(
    images: UInt8[Array, "b h w c"], wanted: Bool[Array, " b"], high: Array, several: Array
) -> Int32[Array, "b c 256"]:
    """Build the tables that spread each channel's values evenly, as Pillow's `ImageOps.equalize` does."""
    count, channels = len(images), images.shape[-1]
    which = jnp.arange(count)[:, None, None, None] * channels + jnp.arange(channels)
    # Only the images that need it are counted: the others' indices lie outside and are dropped.
    outside = count * channels * 256
    index = jnp.where(wanted[:, None, None, None], 256 * which + images, outside)
    counts = jnp.zeros(outside, jnp.int32).at[index.reshape(-1)].add(1, mode="drop")
    counts = counts.reshape(count, channels, 256)
    last = jnp.take_along_axis(counts, high, axis=-1)
    step = (images.shape[1] * images.shape[2] - last) // 255
    below = jnp.cumsum(counts, -1) - counts
    spread = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(several & (step > 0), spread, jnp.arange(256, dtype=jnp.int32))


def _grey(wide: Int32[Array, "b h w c"]) -> Int32[Array, "b h w 1"]:
    if wide.shape[-1] == 1:
        return wide
    red, green, blue = (wide[..., c : c + 1] * _LUMA[c] for c in range(3))
    return (red + green + blue + 0x8000) >> 16


def _smoothed(wide: Int32[Array, "b h w c"]) -> Int32[Array, "b h w c"]:
    """Average 3 x 3 pixels, the middle one counted five times; the border stays."""
    height, width = wide.shape[1:3]
    if height < 3 or width < 3:
        return wide
    inner = np.s_[:, 1:-1, 1:-1]
    total = 4 * wide[inner]
    for y in range(3):
        for x in range(3):
            total += wide[:, y : height - 2 + y, x : width - 2 + x]
    return wide.at[inner].set((2 * total + 13) // 26)


def _number_in(names: tuple[str, ...], operation: Int[Array, " b"]) -> Int32[Array, " b"]:
    """Translate indices into `NAMES` to indices into `names`, -1 for operations that are not in `names`."""
    numbers = [names.index(name) if name in names else -1 for name in NAMES]
    return jnp.asarray([*numbers, -1], jnp.int32)[operation]  # NOTHING is the last

"""Distort brightness, contrast, saturation and hue of 8-bit pixels (Liu et al. 2016, SSD).

Every step clips to 0..255 and cuts off the fraction. Saturation and hue act on 8-bit HSV as in OpenCV: hue is halved to
0..179 and wraps, and conversions round. The order is brightness, contrast (if first), saturation, hue, contrast (if
last).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import UInt8

Pixels = UInt8[np.ndarray, "h w 3"]

BRIGHTNESS = 32  # largest change, in levels
CONTRAST = SATURATION = (0.5, 1.5)  # smallest and largest factor
HUE = 18  # largest change, in units of 2 degrees
_SHIFT = 12  # fixed-point bits of OpenCV's division tables


@dataclasses.dataclass(frozen=True)
class Distortion:
    """The distortion of one image; None for steps that are left out."""

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = True
    saturation: float | None = None
    hue: int | None = None


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw the recipe's distortion: each step with probability one half."""
    on = rng.integers(2, size=5)
    return Distortion(
        rng.uniform(-BRIGHTNESS, BRIGHTNESS) if on[0] else None,
        rng.uniform(*CONTRAST) if on[1] else None,
        bool(on[2]),
        rng.uniform(*SATURATION) if on[3] else None,
        int(rng.integers(-HUE, HUE)) if on[4] else None,
    )


def distort(image: Pixels, distortion: Distortion) -> Pixels:
    """Apply a distortion to RGB pixels."""
    levels = np.arange(256, dtype=np.float32)
    d = distortion
    if d.brightness is not None:
        image = _truncated(levels + np.float32(d.brightness))[image]
    if d.contrast is not None and d.contrast_first:
        image = _truncated(levels * np.float32(d.contrast))[image]
    # Each step converts to HSV and back, as in the reference: both conversions round.
    if d.saturation is not None:
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = _truncated(levels * np.float32(d.saturation))[hsv[..., 1]]
        image = hsv_to_rgb(hsv)
    if d.hue is not None:
        hsv = rgb_to_hsv(image)
        hsv[..., 0] = ((levels.astype(np.int64) + d.hue) % 180).astype(np.uint8)[hsv[..., 0]]
        image = hsv_to_rgb(hsv)
    if d.contrast is not None and not d.contrast_first:
        image = _truncated(levels * np.float32(d.contrast))[image]
    return image


def rgb_to_hsv(image: Pixels) -> Pixels:
    """Convert to 8-bit HSV, hue from 0 to 179, by OpenCV's fixed-point tables."""
    red, green, blue = (image[..., i].astype(np.int32) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    divisors = np.maximum(np.arange(256), 1)
    by_value = np.rint((255 << _SHIFT) / divisors).astype(np.int32)
    by_spread = np.rint((180 << _SHIFT) / (6.0 * divisors)).astype(np.int32)
    by_value[0] = by_spread[0] = 0
    half = 1 << (_SHIFT - 1)
    saturation = (spread * by_value[value] + half) >> _SHIFT
    hue = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (hue * by_spread[spread] + half) >> _SHIFT
    hue += np.where(hue < 0, 180, 0)
    return np.stack([hue, saturation, value], axis=-1).astype(np.uint8)


def hsv_to_rgb(image: Pixels) -> Pixels:
    """Convert 8-bit HSV, hue from 0 to 179, to RGB; computed in float32 and rounded to the nearest level.

    OpenCV rounds the last pixels of a row and cuts off the fractions of those that it converts 32 at a time. On random
    pixels OpenCV 5.0 is thus one level darker in a third of the values, wherever rows are wider. Rounding everywhere is
    kept, because then the result does not depend on the width, and a mean of a third of a level is far below the
    random distortion of up to 32 levels.
    """
    hue = image[..., 0].astype(np.float32) * np.float32(6 / 180)
    saturation = image[..., 1].astype(np.float32) * np.float32(1 / 255)
    value = image[..., 2].astype(np.float32) * np.float32(1 / 255)
    sector = np.floor(hue)
    part = hue - sector
    low = value * (1 - saturation)
    falling = value * (1 - saturation * part)
    rising = value * (1 - saturation * (1 - part))
    index = sector.astype(np.int64) % 6
    choices = np.stack([value, low, falling, rising])
    order = np.asarray([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]], np.int64)
    picked = np.take_along_axis(choices, order[index].transpose(2, 0, 1), axis=0)
    return np.rint(picked * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def _truncated(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)

"""RandAugment and colour jitter on 8-bit Pillow images.

RandAugment (Cubuk et al. 2020) in the "increasing" form of the recipes (m9, mstd0.5, inc1): 15 operations, all
of which change an image more as the level rises from 0 to 10. Two are drawn with replacement; each is applied
with probability 0.5 at a level drawn from a normal distribution around the magnitude, clipped to 0-10.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_LEVEL = 10.0
LAYERS = 2
"""Operations drawn for an image."""
NOTHING = -1
"""Stands for no operation: the layer leaves the image as it is."""
FILL = (124, 116, 104)
"""Colour of what an operation moves into view: the mean of ImageNet."""
FILL_GREY = 118
_AFFINE, _BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC

JITTERED = ("brightness", "contrast", "colour")
"""Properties that colour jitter changes."""
_ENHANCEMENTS: dict[str, type] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "colour": ImageEnhance.Color,
}

Operation = Callable[[Image.Image, float], Image.Image]


def rand_augment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    magnitude: float = 9.0,
    std: float = 0.5,
    layers: int = LAYERS,
    probability: float = 0.5,
) -> Image.Image:
    """Apply `layers` random operations, each with `probability`.

    Args:
        image: mode L or RGB.
        rng: draws operations, levels and signs.
        magnitude: mean level, from 0 to 10.
        std: standard deviation of the level.
        layers: operations drawn.
        probability: with which each is applied.
    """
    drawn = draw_operations(
        rng, magnitude=magnitude, std=std, layers=layers, probability=probability
    )
    for number, level in drawn:
        if number != NOTHING:
            image = OPERATIONS[NAMES[number]](image, level)
    return image


def draw_operations(
    rng: np.random.Generator,
    *,
    magnitude: float = 9.0,
    std: float = 0.5,
    layers: int = LAYERS,
    probability: float = 0.5,
) -> list[tuple[int, float]]:
    """Draw for each layer the number of its operation in `NAMES`, or `NOTHING`, and the level with its sign."""
    drawn = []
    for _ in range(layers):
        number = int(rng.integers(len(NAMES)))
        if rng.random() >= probability:
            drawn.append((NOTHING, 0.0))
            continue
        level = float(np.clip(rng.normal(magnitude, std), 0, MAX_LEVEL))
        sign = 1 if rng.random() < 0.5 else -1
        drawn.append((number, sign * level if NAMES[number] in SIGNED else level))
    return drawn


def colour_jitter(image: Image.Image, rng: np.random.Generator, *, strength: float) -> Image.Image:
    """Change brightness, contrast and saturation, in random order, by factors of 1 ± `strength`, uniformly."""
    for name, factor in draw_jitter(rng, strength=strength):
        image = _ENHANCEMENTS[name](image).enhance(factor)
    return image


def draw_jitter(rng: np.random.Generator, *, strength: float) -> list[tuple[str, float]]:
    """Draw the order of `JITTERED` and the factor of each."""
    return [
        (JITTERED[i], rng.uniform(max(0.0, 1 - strength), 1 + strength))
        for i in rng.permutation(len(JITTERED))
    ]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Pull pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, _AFFINE, matrix, _BICUBIC, fillcolor=_fill(image))


def _rotate(image: Image.Image, level: float) -> Image.Image:
    """Rotate by up to 30 degrees."""
    return image.rotate(level / MAX_LEVEL * 30, _BICUBIC, fillcolor=_fill(image))


def _shear_x(image: Image.Image, level: float) -> Image.Image:
    """Shear by up to 0.3."""
    return _affine(image, 1.0, level / MAX_LEVEL * 0.3, 0.0, 0.0, 1.0, 0.0)


def _shear_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1.0, 0.0, 0.0, level / MAX_LEVEL * 0.3, 1.0, 0.0)


def _translate_x(image: Image.Image, level: float) -> Image.Image:
    """Translate by up to 0.45 of the width."""
    return _affine(image, 1.0, 0.0, level / MAX_LEVEL * 0.45 * image.width, 0.0, 1.0, 0.0)


def _translate_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1.0, 0.0, 0.0, 0.0, 1.0, level / MAX_LEVEL * 0.45 * image.height)


def _posterize(image: Image.Image, level: float) -> Image.Image:
    """Keep 4 bits at level 0, none at 10."""
    mask = 0xFF & (0xFF << (8 - (4 - int(level / MAX_LEVEL * 4))))
    return _pointwise(image, lambda values: values & mask)


def _solarize(image: Image.Image, level: float) -> Image.Image:
    """Invert pixels at or above a threshold, which falls from 256 at level 0 to 0 at level 10."""
    threshold = 256 - int(level / MAX_LEVEL * 256)
    return _pointwise(image, lambda values: np.where(values < threshold, values, 255 - values))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    """Add a number, up to 110 at level 10, to pixels below 128."""
    added = int(level / MAX_LEVEL * 110)
    return _pointwise(
        image, lambda values: np.where(values < 128, np.minimum(values + added, 255), values)
    )


def _enhance(kind: type) -> Operation:
    """Blend with the image's degenerate form: factors from 0.1 to 1.9, further from 1 at higher levels."""

    def operation(image: Image.Image, level: float) -> Image.Image:
        return kind(image).enhance(max(0.1, 1 + level / MAX_LEVEL * 0.9))

    return operation


def _pointwise(image: Image.Image, f: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    return image.point(f(np.arange(256)).tolist() * len(image.getbands()))


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    return FILL_GREY if image.mode == "L" else FILL


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "invert": lambda image, level: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "colour": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""What each operation does at a level from 0 to 10."""

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
SIGNED = frozenset((*GEOMETRIC, "colour", "contrast", "brightness", "sharpness"))
"""Operations whose level is taken with a random sign."""

NAMES = tuple(OPERATIONS)
"""The operations by number."""

"""Crops, resizes and flips of Pillow images for any task, each drawing from an explicit generator.

A record's generator is seeded by the run's seed and the record's position in the endless sequence of
epochs, so the number of workers and restarts change nothing.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fastvim_jax.data.turbo import LAZY, Picture

_ELONGATED = 8
_BICUBIC = Image.Resampling.BICUBIC


def random_resized_crop(
    image: Picture,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Crop a random box and resize it (bicubic) to `size` = (height, width).

    The box's share of the area is uniform in `scale`, its width over height log-uniform in `aspect`
    (Szegedy et al., Going deeper with convolutions, section 6). After ten boxes that do not fit: the
    largest centred box whose aspect lies within the bounds.
    """
    box = random_box(image.width, image.height, rng, scale, aspect)
    if isinstance(image, LAZY):
        return image.crop_resized(box, size)
    return resized(image.crop(box), size)


def random_box(
    full_width: int,
    full_height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw the box that `random_resized_crop` crops of an image of this size: left, top, right and bottom."""
    left, top, width, height = _random_box(full_width, full_height, rng, scale, aspect)
    return left, top, left + width, top + height


def _random_box(
    full_width: int,
    full_height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Return left, top, width, height of the random resized crop's box."""
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        area = full_width * full_height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*log_aspect))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= full_width and 0 < height <= full_height:
            left = int(rng.integers(0, full_width - width + 1))
            top = int(rng.integers(0, full_height - height + 1))
            return left, top, width, height
    ratio = min(max(full_width / full_height, aspect[0]), aspect[1])
    width = max(1, min(full_width, round(full_height * ratio)))
    height = max(1, min(full_height, round(full_width / ratio)))
    return (full_width - width) // 2, (full_height - height) // 2, width, height


def pad_and_shift(
    image: Picture, size: tuple[int, int], rng: np.random.Generator, *, pad: int
) -> Image.Image:
    """Resize to `size`, add `pad` zero pixels on each side, crop `size` at a random offset."""
    whole = resized(image, size)
    left, top = (int(v) for v in rng.integers(0, 2 * pad + 1, size=2))
    # A crop box beyond the image is filled with zeros by Pillow.
    return whole.crop((left - pad, top - pad, left - pad + size[1], top - pad + size[0]))


def horizontal_flip(
    image: Image.Image, rng: np.random.Generator, *, probability: float
) -> Image.Image:
    """Mirror left and right with the given probability."""
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def resize_and_centre_crop(
    image: Picture, size: tuple[int, int], *, ratio: float
) -> UInt8[np.ndarray, "h w c"]:
    """Resize (bicubic, aspect kept) so that `size` / `ratio` is covered, then crop `size` at the centre.

    Of an image more than `_ELONGATED` times as long as `size` asks for, only the middle is resized: a strip of 1 x 3000
    pixels would become 256 x 768,000.
    """
    height, width = size
    box = _middle(image, size)
    if isinstance(image, Image.Image) and box != (0, 0, image.width, image.height):
        image = image.crop(box)
    full_width, full_height = box[2] - box[0], box[3] - box[1]
    # The resized image covers floor(size / ratio): 224 at 0.875 gives a shorter side of 256.
    factor = max(
        math.floor(height / ratio + 1e-9) / full_height,
        math.floor(width / ratio + 1e-9) / full_width,
    )
    new = max(height, round(full_height * factor)), max(width, round(full_width * factor))
    left, top = round((new[1] - width) / 2), round((new[0] - height) / 2)
    if isinstance(image, LAZY):
        return image.crop_pixels(box, new)[top : top + height, left : left + width]
    return to_array(resized(image, new).crop((left, top, left + width, top + height)))


def _middle(image: Picture, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the image without the ends of a strip, which no centre crop keeps."""
    height, width = size
    most_width = max(1, math.ceil(_ELONGATED * image.height * width / height))
    most_height = max(1, math.ceil(_ELONGATED * image.width * height / width))
    kept_width, kept_height = min(image.width, most_width), min(image.height, most_height)
    left, top = (image.width - kept_width) // 2, (image.height - kept_height) // 2
    return left, top, left + kept_width, top + kept_height


def resized(image: Picture, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width), bicubic; nothing to do at the right size."""
    if isinstance(image, LAZY):
        return image.crop_resized((0, 0, image.width, image.height), size)
    if (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), _BICUBIC)


def to_array(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """Return the pixels channels-last; a greyscale image has c = 1."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels

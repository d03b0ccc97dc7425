"""Image transforms on Pillow images, each drawing from an explicit generator.

A record's generator is seeded by the run's seed and the record's position in the endless sequence of
epochs, so the number of workers and restarts change nothing.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fastvim_jax.data.config import DataConfig
from fastvim_jax.data.randaugment import colour_jitter, rand_augment
from fastvim_jax.data.turbo import Picture, TurboJpeg

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
    box = random_box(image, rng, scale, aspect)
    if isinstance(image, TurboJpeg):
        return image.crop_resized(box, size)
    return resized(image.crop(box), size)


def random_box(
    image: Picture,
    rng: np.random.Generator,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the box that `random_resized_crop` crops."""
    left, top, width, height = _random_box(image.width, image.height, rng, scale, aspect)
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


def resize_and_centre_crop(image: Picture, size: tuple[int, int], *, ratio: float) -> Image.Image:
    """Resize (bicubic, aspect kept) so that `size` / `ratio` is covered, then crop `size` at the centre."""
    height, width = size
    # The resized image covers floor(size / ratio): 224 at 0.875 gives a shorter side of 256.
    factor = max(
        math.floor(height / ratio + 1e-9) / image.height,
        math.floor(width / ratio + 1e-9) / image.width,
    )
    new = max(height, round(image.height * factor)), max(width, round(image.width * factor))
    whole = resized(image, new)
    left, top = round((new[1] - width) / 2), round((new[0] - height) / 2)
    return whole.crop((left, top, left + width, top + height))


def resized(image: Picture, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width), bicubic; nothing to do at the right size."""
    if isinstance(image, TurboJpeg):
        return image.crop_resized((0, 0, image.width, image.height), size)
    if (image.height, image.width) == size:
        return image
    return image.resize((size[1], size[0]), _BICUBIC)


def to_array(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """Return the pixels channels-last; a greyscale image has c = 1."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def train_transform(
    picture: Picture, config: DataConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w c"]:
    """Apply the configured training augmentation; pixels stay uint8."""
    size = config.height_width
    if isinstance(picture, TurboJpeg) and _crop_and_flip_only(config):
        # The same draws and pixels as below, without a Pillow image in between.
        box = random_box(picture, rng, config.crop_scale, config.crop_aspect)
        pixels = picture.crop_pixels(box, size)
        if config.flip and rng.random() < config.flip:
            # As one value a pixel, which NumPy copies backwards twice as fast as three.
            mirrored = np.ascontiguousarray(pixels).view("V3")[:, ::-1]
            return np.ascontiguousarray(mirrored).view(np.uint8)
        return pixels
    if config.crop == "random_resized":
        image = random_resized_crop(
            picture, size, rng, scale=config.crop_scale, aspect=config.crop_aspect
        )
    elif config.crop == "pad_shift":
        image = pad_and_shift(picture, size, rng, pad=config.pad)
    else:
        image = resized(picture, size)
    if config.flip:
        image = horizontal_flip(image, rng, probability=config.flip)
    if config.rand_augment is not None:
        image = rand_augment(image, rng, magnitude=config.rand_augment, std=config.rand_augment_std)
    if config.colour_jitter:
        image = colour_jitter(image, rng, strength=config.colour_jitter)
    return to_array(image)


def _crop_and_flip_only(config: DataConfig) -> bool:
    return (
        config.crop == "random_resized" and config.rand_augment is None and not config.colour_jitter
    )


def eval_transform(image: Picture, config: DataConfig) -> UInt8[np.ndarray, "h w c"]:
    """Apply the evaluation transform: resize, centre crop; pixels stay uint8."""
    return to_array(resize_and_centre_crop(image, config.height_width, ratio=config.eval_crop))

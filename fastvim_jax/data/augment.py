"""Training augmentation and evaluation transform of labelled images, as `ClassificationData` configures them."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.randaugment import colour_jitter, rand_augment
from fastvim_jax.data.transforms import (
    horizontal_flip,
    pad_and_shift,
    random_box,
    random_resized_crop,
    resize_and_centre_crop,
    resized,
    to_array,
)
from fastvim_jax.data.turbo import Picture, TurboJpeg


def train_transform(
    picture: Picture, config: ClassificationData, rng: np.random.Generator
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


def _crop_and_flip_only(config: ClassificationData) -> bool:
    return (
        config.crop == "random_resized" and config.rand_augment is None and not config.colour_jitter
    )


def eval_transform(image: Picture, config: ClassificationData) -> UInt8[np.ndarray, "h w c"]:
    """Apply the evaluation transform: resize, centre crop; pixels stay uint8."""
    return to_array(resize_and_centre_crop(image, config.height_width, ratio=config.eval_crop))

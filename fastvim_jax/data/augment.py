"""Training augmentation and evaluation transform of labelled images, as `ClassificationData` configures them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.randaugment import (
    JITTERED,
    colour_jitter,
    draw_jitter,
    draw_operations,
    rand_augment,
)
from fastvim_jax.data.transforms import (
    horizontal_flip,
    pad_and_shift,
    random_box,
    random_resized_crop,
    resize_and_centre_crop,
    resized,
    to_array,
)
from fastvim_jax.data.turbo import LAZY, Picture


def train_example(
    picture: Picture, config: ClassificationData, rng: np.random.Generator
) -> dict[str, Any]:
    """Make what a batch holds of a training image: `image`, and what the device needs to augment it.

    With `augment_on="host"` the image is finished; with "device" it is only cropped, and `draw_augmentation` draws what
    `train_transform` would have drawn.
    """
    if config.augment_on == "host":
        return {"image": train_transform(picture, config, rng)}
    return {"image": _cropped(picture, config, rng), **draw_augmentation(config, rng)}


def draw_augmentation(config: ClassificationData, rng: np.random.Generator) -> dict[str, Any]:
    """Draw what `device_randaugment.augment_drawn` needs for one image, from `rng` as it is after the crop.

    Returns:
        Where configured: `flip` bool; `operation` int32 and `level` float32, one for each layer of RandAugment;
        `jitter` int32 (numbers in `JITTERED`, in their order) and `factor` float32.
    """
    drawn: dict[str, Any] = {}
    if config.flip:
        drawn["flip"] = np.bool_(rng.random() < config.flip)
    if config.rand_augment is not None:
        operations = draw_operations(
            rng, magnitude=config.rand_augment, std=config.rand_augment_std
        )
        drawn["operation"] = np.asarray([number for number, _ in operations], np.int32)
        drawn["level"] = np.asarray([level for _, level in operations], np.float32)
    if config.colour_jitter:
        jitter = draw_jitter(rng, strength=config.colour_jitter)
        drawn["jitter"] = np.asarray([JITTERED.index(name) for name, _ in jitter], np.int32)
        drawn["factor"] = np.asarray([factor for _, factor in jitter], np.float32)
    return drawn


DRAWN = ("flip", "operation", "level", "jitter", "factor")
"""What `draw_augmentation` may return."""


def train_transform(
    picture: Picture, config: ClassificationData, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w c"]:
    """Apply the configured training augmentation; pixels stay uint8."""
    if isinstance(picture, LAZY) and _crop_and_flip_only(config):
        # The same draws and pixels as below, without a Pillow image in between.
        pixels = _cropped(picture, config, rng)
        if config.flip and rng.random() < config.flip:
            # As one value per pixel, which NumPy copies backwards twice as fast as three.
            mirrored = np.ascontiguousarray(pixels).view("V3")[:, ::-1]
            return np.ascontiguousarray(mirrored).view(np.uint8)
        return pixels
    image = _crop(picture, config, rng)
    if config.flip:
        image = horizontal_flip(image, rng, probability=config.flip)
    if config.rand_augment is not None:
        image = rand_augment(image, rng, magnitude=config.rand_augment, std=config.rand_augment_std)
    if config.colour_jitter:
        image = colour_jitter(image, rng, strength=config.colour_jitter)
    return to_array(image)


def _crop(picture: Picture, config: ClassificationData, rng: np.random.Generator) -> Image.Image:
    size = config.height_width
    if config.crop == "random_resized":
        return random_resized_crop(
            picture, size, rng, scale=config.crop_scale, aspect=config.crop_aspect
        )
    if config.crop == "pad_shift":
        return pad_and_shift(picture, size, rng, pad=config.pad)
    return resized(picture, size)


def _cropped(
    picture: Picture, config: ClassificationData, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w c"]:
    """Crop to an array, without a Pillow image in between where there need be none."""
    if config.crop == "random_resized" and isinstance(picture, LAZY):
        box = random_box(picture.width, picture.height, rng, config.crop_scale, config.crop_aspect)
        return picture.crop_pixels(box, config.height_width)
    return to_array(_crop(picture, config, rng))


def _crop_and_flip_only(config: ClassificationData) -> bool:
    return (
        config.crop == "random_resized" and config.rand_augment is None and not config.colour_jitter
    )


def eval_transform(image: Picture, config: ClassificationData) -> UInt8[np.ndarray, "h w c"]:
    """Apply the evaluation transform: resize, centre crop; pixels stay uint8."""
    return resize_and_centre_crop(image, config.height_width, ratio=config.eval_crop)

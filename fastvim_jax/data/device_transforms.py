"""Transforms inside the jitted step: crop and flip, normalisation, random erasing, mixup and cutmix.

With `augment_on="device"`, the batch holds what the host drew for each image (`augment.draw_augmentation`), and flip,
RandAugment and colour jitter come first (`device_randaugment`). All else is drawn from a key and from an image's
position in the global batch, so a batch comes out the same on any number of devices and processes. The order is that of
the recipes: normalise each image, erase a box, then mix. Mixing pairs the images of a group (neighbours in the batch):
the first with the last, the second with the last but one, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from fastvim_jax.data.augment import DRAWN
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.config import DataConfig
from fastvim_jax.data.device_draws import draw_augmentation
from fastvim_jax.data.device_randaugment import augment_drawn
from fastvim_jax.data.device_resize import crop_resize, draw_boxes
from fastvim_jax.data.per_device import on_each_device

DeviceBatch = Mapping[str, Any]
Preprocess = Callable[[UInt8[Array, "b h w c"]], Float[Array, "b h w c"]]
Augment = Callable[[Key[Array, ""], DeviceBatch], DeviceBatch]

ERASED_AREA = (0.02, 1 / 3)
"""Smallest and largest share of the image's area that random erasing fills."""
ERASED_ASPECT = (0.3, 1 / 0.3)
"""Smallest and largest ratio of the erased box's height to its width."""
_ATTEMPTS = 10
"""Candidates that are drawn, of boxes to erase and of shares to mix by; the first acceptable one is taken."""


def make_preprocess(config: DataConfig) -> Preprocess:
    """Build the map from uint8 images `b h w c` to the model's input, float32: (pixels / 255 - mean) / std."""
    std = np.asarray(config.std)
    scale = (1.0 / (255.0 * std)).astype(np.float32)
    shift = (-np.asarray(config.mean) / std).astype(np.float32)

    def preprocess(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return images.astype(jnp.float32) * scale + shift

    return preprocess


def make_augment(
    config: ClassificationData, num_classes: int, *, label_smoothing: float = 0.0
) -> Augment:
    """Build the function `augment(key, batch) -> batch` of a training batch, for use inside the step.

    It takes the whole global batch: `image` uint8 `b h w c` and `label` int32 `b`. With `augment_on="device"` the batch
    also holds what the host drew; resident images that are cropped here come with `source_size`, int32 `b 2`. It
    returns `image`, normalised float32, and `label`: unchanged, or with mixup or cutmix the smoothed soft targets
    `b classes`, float32.

    Args:
        config: which augmentations are on, and how strong they are.
        num_classes: length of the soft targets.
        label_smoothing: mass of each soft target that is spread evenly. The loss smooths integer labels instead.
    """
    preprocess = make_preprocess(config)

    def augment(key: Key[Array, ""], batch: DeviceBatch) -> DeviceBatch:
        shift_key, flip_key, erase_key, mix_key = jax.random.split(key, 4)
        images, label = batch["image"], batch["label"]
        drawn = {name: batch[name] for name in DRAWN if name in batch}
        if config.resident:
            images = _cropped(shift_key, batch, config)
            if config.flip:
                images = horizontal_flip(flip_key, images, probability=config.flip)
            drawn = draw_augmentation(jax.random.fold_in(shift_key, 1), config, len(images))
        images = preprocess(augment_drawn(images, drawn))
        if config.random_erasing:
            images = random_erasing(erase_key, images, probability=config.random_erasing)
        if config.mixup or config.cutmix:
            images, label = mix_groups(mix_key, images, label, config, num_classes, label_smoothing)
        used = (*DRAWN, "source_size")
        kept = {name: value for name, value in batch.items() if name not in used}
        return {**kept, "image": images, "label": label}

    return augment


def _cropped(key: Array, batch: DeviceBatch, config: ClassificationData) -> UInt8[Array, "b h w c"]:
    """Crop resident images at random."""
    images = batch["image"]
    if config.crop == "pad_shift":
        return pad_and_shift(key, images, pad=config.pad)
    if config.crop == "resize":
        return images
    sizes = batch["source_size"]
    boxes = draw_boxes(key, sizes, scale=config.crop_scale, aspect=config.crop_aspect)
    # The images are kept as squares, whatever their proportions were.
    kept = jnp.asarray([images.shape[2], images.shape[1]] * 2)
    boxes = boxes * (kept / jnp.concatenate([sizes[:, ::-1]] * 2, axis=1))
    return on_each_device(
        lambda images, boxes: crop_resize(images, boxes, config.height_width), images, boxes
    )


def pad_and_shift(
    key: Key[Array, ""], images: UInt8[Array, "b h w c"], *, pad: int
) -> UInt8[Array, "b h w c"]:
    """Add `pad` zero pixels on each side of every image, and crop its size at a random offset."""
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def crop(key: Array, image: Array) -> Array:
        top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(crop)(_keys(key, len(images)), padded)


def horizontal_flip(
    key: Key[Array, ""], images: UInt8[Array, "b h w c"], *, probability: float
) -> UInt8[Array, "b h w c"]:
    """Mirror each image left and right with the given probability."""
    chosen = jax.vmap(lambda k: jax.random.bernoulli(k, probability))(_keys(key, len(images)))
    return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def random_erasing(
    key: Key[Array, ""], images: Float[Array, "b h w c"], *, probability: float
) -> Float[Array, "b h w c"]:
    """Fill one box of each image, with the given probability, with noise: one standard normal number per value.

    Zhong et al. 2020, with noise instead of the original's one colour. The noise has the scale of normalised pixels.
    `erased_box` draws the box.
    """

    def erase(key: Array, image: Array) -> Array:
        chosen, box, noise = jax.random.split(key, 3)
        inside = erased_box(box, (image.shape[0], image.shape[1])) & jax.random.bernoulli(
            chosen, probability
        )
        return jnp.where(inside[..., None], jax.random.normal(noise, image.shape), image)

    return jax.vmap(erase)(_keys(key, len(images)), images)


def erased_box(key: Key[Array, ""], size: tuple[int, int]) -> Bool[Array, "h w"]:
    """Draw a mask that is True inside a random box.

    Its share of the area is uniform in `ERASED_AREA`, its height over width log-uniform in `ERASED_ASPECT`, its place
    uniform. Ten boxes are drawn, and the first one that is smaller than the image in both directions is used. If there
    is none, the mask is empty.
    """
    height, width = size
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    share = jax.random.uniform(area_key, (_ATTEMPTS,), minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    low, high = map(math.log, ERASED_ASPECT)
    ratio = jnp.exp(jax.random.uniform(aspect_key, (_ATTEMPTS,), minval=low, maxval=high))
    area = share * (height * width)
    heights = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    box_height, box_width = heights[first], widths[first]
    top = jax.random.randint(top_key, (), 0, jnp.maximum(height - box_height, 0) + 1)
    left = jax.random.randint(left_key, (), 0, jnp.maximum(width - box_width, 0) + 1)
    return _box(size, top, top + box_height, left, left + box_width) & fits.any()


def mix_groups(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    label: Int[Array, " b"],
    config: ClassificationData,
    num_classes: int,
    smoothing: float,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Mix the images of each group of `config.mix_group` neighbours in the batch, each group by a draw of its own.

    Devices hold contiguous parts of the batch, so groups rarely mix images of different devices. A group's draw depends
    on its number alone, so a batch comes out the same on any number of devices. The last group may be smaller.
    """
    size = min(config.mix_group, len(images))
    whole = len(images) // size * size

    def one(number: Array, images: Array, label: Array) -> tuple[Array, Array]:
        weight, share = mix_weights(
            jax.random.fold_in(key, number),
            (images.shape[1], images.shape[2]),
            mixup=config.mixup,
            cutmix=config.cutmix,
            probability=config.mix_prob,
            switch_probability=config.mix_switch_prob,
        )
        return mix(images, weight), mixed_targets(label, share, num_classes, smoothing)

    def grouped(values: Array) -> Array:
        return values[:whole].reshape(-1, size, *values.shape[1:])

    found = jax.vmap(one)(jnp.arange(whole // size), grouped(images), grouped(label))
    parts = [[part.reshape(whole, *part.shape[2:]) for part in found]]
    if whole < len(images):
        parts.append([*one(jnp.asarray(whole // size), images[whole:], label[whole:])])
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    mixed, targets = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return mixed, targets


def mix_weights(
    key: Key[Array, ""],
    size: tuple[int, int],
    *,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> tuple[Float[Array, "h w"], Float[Array, ""]]:
    """Draw the share of itself that every image of a group keeps: at each pixel, and on average.

    Mixup (Zhang et al. 2018) keeps the same share λ of every pixel. Cutmix (Yun et al. 2019) replaces a box whose sides
    are √(1 - λ) of the image's, around a uniform centre and cut off at the border; λ then becomes the share of pixels
    that really stay. λ is drawn from Beta(α, α).

    Args:
        key: key of the group.
        size: height and width of the images.
        mixup: α of mixup; 0: off.
        cutmix: α of cutmix; 0: off.
        probability: probability that the group is mixed.
        switch_probability: probability of cutmix instead of mixup, if both are on.
    """
    on_key, switch_key, share_key, box_key = jax.random.split(key, 4)
    if mixup and cutmix:
        cut = jax.random.bernoulli(switch_key, switch_probability)
    else:
        cut = jnp.asarray(bool(cutmix))
    alpha = jnp.where(cut, cutmix, mixup)
    share = symmetric_beta(share_key, alpha)
    share = jnp.where(jax.random.bernoulli(on_key, probability), share, 1.0)
    outside = ~cutmix_box(box_key, size, share)
    weight = jnp.where(cut, outside.astype(jnp.float32), share)
    return weight, jnp.where(cut, outside.sum() / outside.size, share)


def symmetric_beta(key: Key[Array, ""], alpha: Float[Array, ""]) -> Float[Array, ""]:
    """Draw a number from Beta(α, α), α > 0, without a loop.

    `jax.random.beta` draws again until a draw is accepted. In a step on several GPUs each of its rounds makes all GPUs
    and the host wait for each other. Here `_ATTEMPTS` candidates are drawn at once and the first accepted one is
    taken; each is refused with a probability below 5 %, so that none is left in less than one of 10¹³ draws.

    Marsaglia and Tsang 2000: of a standard normal x and v = (1 + x / √(9d))³, d·v is a draw from Gamma(d + 1/3) if
    log u < x²/2 + d - d·v + d·log v. If G is from Gamma(α + 1), then G·u^(1/α) is from Gamma(α). The ratio of one of
    two such draws to their sum is from Beta(α, α).
    """
    normal_key, accept_key, power_key = jax.random.split(key, 3)
    d = alpha + (1 - 1 / 3)
    x = jax.random.normal(normal_key, (2, _ATTEMPTS))
    v = jnp.maximum(1 + x / jnp.sqrt(9 * d), 0.0) ** 3
    log_v = jnp.log(v)  # minus infinity, never accepted, where v is 0
    log_u = jnp.log1p(-jax.random.uniform(accept_key, (2, _ATTEMPTS)))
    accepted = log_u < x**2 / 2 + d - d * v + d * log_v
    first = jnp.argmax(accepted, axis=1)
    log_gamma = jnp.take_along_axis(log_v, first[:, None], axis=1)[:, 0]
    log_gamma += jnp.log1p(-jax.random.uniform(power_key, (2,))) / alpha
    return jax.nn.sigmoid(log_gamma[0] - log_gamma[1])


def cutmix_box(
    key: Key[Array, ""], size: tuple[int, int], share: Float[Array, ""]
) -> Bool[Array, "h w"]:
    """Draw a mask that is True inside cutmix's box for the λ `share`; see `mix_weights`."""
    side = jnp.sqrt(1.0 - share)
    bounds: list[Array] = []
    for length, centre_key in zip(size, jax.random.split(key), strict=True):
        half = jnp.floor(length * side).astype(jnp.int32) // 2
        centre = jax.random.randint(centre_key, (), 0, length)
        bounds += [centre - half, centre + half]
    return _box(size, *bounds)


def mix(images: Float[Array, "b h w c"], weight: Float[Array, "h w"]) -> Float[Array, "b h w c"]:
    """Blend each image of a group with its partner: the first with the last, the second with the last but one, ..."""
    weight = weight[..., None]
    return images * weight + jnp.flip(images, 0) * (1.0 - weight)


def mixed_targets(
    label: Int[Array, " b"], share: Float[Array, ""], num_classes: int, smoothing: float
) -> Float[Array, "b classes"]:
    """Compute the soft targets of mixed images: both labels, weighted by their shares, then smoothed. Rows sum to 1."""

    one_hot = jax.nn.one_hot(label, num_classes)
    mixed = one_hot * share + jnp.flip(one_hot, 0) * (1.0 - share)
    return mixed * (1.0 - smoothing) + smoothing / num_classes


def _box(size: tuple[int, int], top: Array, bottom: Array, left: Array, right: Array) -> Array:
    """Return a mask that is True inside the box; parts outside the image are cut off."""
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def _keys(key: Array, count: int) -> Array:
    """Derive one key for each position in the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))

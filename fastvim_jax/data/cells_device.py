"""The cell recipe's augmentation inside the jitted step, for any number of channels: turn, defocus, dropout, normalise.

Everything is drawn from a key and from an image's position in the global batch, so a batch comes out the same on any
number of devices and processes. All channels of an image get the same turn, blur and holes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.device_transforms import Augment, DeviceBatch

TURNS = np.array(
    # Transposed, then turned upside down, then mirrored.
    [
        [0, 0, 0],  # as it is
        [0, 0, 1],  # mirrored left and right
        [0, 1, 0],  # mirrored top and bottom
        [1, 1, 0],  # by 90 degrees, against the clock
        [0, 1, 1],  # by 180 degrees
        [1, 0, 1],  # by 270 degrees
    ],
    bool,
)
ChannelPreprocess = Callable[..., Float[Array, "b h w k"]]


def make_preprocess(config: CellsData) -> ChannelPreprocess:
    """Return `preprocess(images, channel_ids=None)`: (pixels / 255 - mean) / std with the mean of each channel.

    Images are `b h w k`, uint8 or float on a scale of 0 to 255; `channel_ids` `b k` says which channels they hold, None
    that they hold all of the config's.
    """
    mean, std = np.asarray(config.mean), np.asarray(config.std)
    scale = (1.0 / (255.0 * std)).astype(np.float32)
    shift = (-mean / std).astype(np.float32)

    def preprocess(images: Array, channel_ids: Array | None = None) -> Float[Array, "b h w k"]:
        images = images.astype(jnp.float32)
        if channel_ids is None:
            return images * scale + shift
        return images * _by_image(scale, channel_ids) + _by_image(shift, channel_ids)

    return preprocess


def make_augment(config: CellsData) -> Augment:
    """Return `augment(key, batch) -> batch` of a training batch; `image` uint8 `b h w k` becomes normalised float32."""
    preprocess = make_preprocess(config)

    def augment(key: Key[Array, ""], batch: DeviceBatch) -> DeviceBatch:
        turn_key, blur_key, hole_key = jax.random.split(key, 3)
        images = batch["image"]
        if config.flip:
            images = turn(turn_key, images, probability=config.flip)
        images = images.astype(jnp.float32)
        if config.defocus:
            images = defocus(
                blur_key, images, probability=config.defocus, radius=config.defocus_radius
            )
        if config.dropout:
            images = drop_holes(
                hole_key,
                images,
                probability=config.dropout,
                holes=config.dropout_holes,
                size=config.dropout_size,
            )
        return {**batch, "image": preprocess(images, batch.get("channel_ids"))}

    return augment


def turn(
    key: Key[Array, ""], images: UInt8[Array, "b h h c"], *, probability: float
) -> UInt8[Array, "b h h c"]:
    """Mirror or turn each square image, with the given probability, in one of five ways."""

    def draw(key: Array) -> Array:
        chosen, which = jax.random.split(key)
        way = jax.random.randint(which, (), 1, len(TURNS))
        return jnp.where(jax.random.bernoulli(chosen, probability), way, 0)

    ways = jax.vmap(draw)(_keys(key, len(images)))
    across, down, mirrored = (choice[:, None, None, None] for choice in jnp.asarray(TURNS)[ways].T)
    images = jnp.where(across, images.swapaxes(1, 2), images)
    images = jnp.where(down, images[:, ::-1], images)
    return jnp.where(mirrored, images[:, :, ::-1], images)


def disk(radius: int) -> Float[np.ndarray, "n n"]:
    """Return a disk's share of each pixel around its centre, `2 radius + 1` squared, from 9 x 9 samples each; sum 1."""
    samples = 9
    steps = (np.arange((2 * radius + 1) * samples) + 0.5) / samples - radius - 0.5
    inside = (steps[:, None] ** 2 + steps[None] ** 2 <= (radius + 0.5) ** 2).astype(np.float64)
    shares = inside.reshape(2 * radius + 1, samples, 2 * radius + 1, samples).sum(axis=(1, 3))
    return (shares / shares.sum()).astype(np.float32)


def defocus(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    *,
    probability: float,
    radius: tuple[int, int],
) -> Float[Array, "b h w c"]:
    """Convolve each image, with the given probability, with a disk whose radius is drawn from `radius`, both included.

    The border is repeated outwards.
    """
    low, high = radius
    side = 2 * high + 1
    kernels = np.zeros((high + 1, side, side), np.float32)
    kernels[0, high, high] = 1.0
    for r in range(low, high + 1):
        kernels[r, high - r : high + r + 1, high - r : high + r + 1] = disk(r)

    def draw(key: Array) -> Array:
        chosen, size = jax.random.split(key)
        drawn = jax.random.randint(size, (), low, high + 1)
        return jnp.where(jax.random.bernoulli(chosen, probability), drawn, 0)

    weights = jnp.asarray(kernels)[jax.vmap(draw)(_keys(key, len(images)))]
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (high, high), (high, high), (0, 0)), mode="edge")
    blurred = jnp.zeros_like(images)
    for row, column in np.argwhere(kernels.any(axis=0)):
        shifted = padded[:, row : row + height, column : column + width]
        blurred += weights[:, row, column, None, None, None] * shifted
    return blurred


def drop_holes(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    *,
    probability: float,
    holes: int,
    size: int,
) -> Float[Array, "b h w c"]:
    """Set 1 to `holes` boxes of each image to 0, with the given probability; sides are 1 to `size` pixels."""
    height, width = images.shape[1:3]
    largest = (min(size, height), min(size, width))

    def draw(key: Array) -> Array:
        chosen, number, sides, places = jax.random.split(key, 4)
        count = jax.random.randint(number, (), 1, holes + 1)
        count = jnp.where(jax.random.bernoulli(chosen, probability), count, 0)
        tall = jax.random.randint(sides, (holes, 2), 1, jnp.asarray(largest) + 1)
        room = jnp.asarray((height, width)) - tall + 1
        share = jax.random.uniform(places, (holes, 2))
        corner = jnp.minimum(jnp.floor(share * room).astype(jnp.int32), room - 1)
        rows, columns = jnp.arange(height), jnp.arange(width)
        down = (rows >= corner[:, :1]) & (rows < corner[:, :1] + tall[:, :1])
        across = (columns >= corner[:, 1:]) & (columns < corner[:, 1:] + tall[:, 1:])
        counted = (jnp.arange(holes) < count)[:, None, None]
        return (down[:, :, None] & across[:, None] & counted).any(axis=0)

    inside = jax.vmap(draw)(_keys(key, len(images)))
    return jnp.where(inside[..., None], 0.0, images)


def _by_image(values: np.ndarray, channel_ids: Int[Array, "b k"]) -> Float[Array, "b 1 1 k"]:
    return jnp.asarray(values)[channel_ids][:, None, None]


def _keys(key: Array, count: int) -> Array:
    """Derive one key per position in the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))

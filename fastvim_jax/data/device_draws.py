"""Draw RandAugment and colour jitter on the device, with the host's distributions, for images that stay there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.randaugment import JITTERED, LAYERS, MAX_LEVEL, NAMES, NOTHING, SIGNED


def draw_augmentation(
    key: Key[Array, ""], config: ClassificationData, count: int
) -> dict[str, Array]:
    """Draw for each of `count` images what `augment.draw_augmentation` draws, without `flip`.

    An image's draws depend on `key` and its position in the batch.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    drawn: dict[str, Array] = {}
    if config.rand_augment is not None:
        magnitude, std = config.rand_augment, config.rand_augment_std
        operation, level = jax.vmap(lambda k: _operations(k, magnitude, std))(keys)
        drawn |= {"operation": operation, "level": level}
    if config.colour_jitter:
        kind, factor = jax.vmap(lambda k: _jitter(k, config.colour_jitter))(keys)
        drawn |= {"jitter": kind, "factor": factor}
    return drawn


def _operations(key: Array, magnitude: float, std: float) -> tuple[Array, Array]:
    number_key, on_key, level_key, sign_key = jax.random.split(key, 4)
    number = jax.random.randint(number_key, (LAYERS,), 0, len(NAMES))
    on = jax.random.bernoulli(on_key, 0.5, (LAYERS,))
    level = jnp.clip(magnitude + std * jax.random.normal(level_key, (LAYERS,)), 0, MAX_LEVEL)
    signed = jnp.asarray([name in SIGNED for name in NAMES])[number]
    negative = signed & jax.random.bernoulli(sign_key, 0.5, (LAYERS,))
    return jnp.where(on, number, NOTHING), jnp.where(negative, -level, level)


def _jitter(key: Array, strength: float) -> tuple[Array, Array]:
    order_key, factor_key = jax.random.split(jax.random.fold_in(key, LAYERS))
    count = len(JITTERED)
    factor = jax.random.uniform(
        factor_key, (count,), minval=max(0.0, 1 - strength), maxval=1 + strength
    )
    return jax.random.permutation(order_key, count).astype(jnp.int32), factor

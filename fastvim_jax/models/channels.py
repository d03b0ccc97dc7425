"""Call any model on images that hold only some of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastvim_jax.layers.channel_embed import ChannelIds
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.typing import Images


def channel_inputs(model: Any, images: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments to call `model` with, for normalised `images` that hold the channels named in the batch.

    A channel model gets `channel_ids`. Any other model gets all channels; missing ones are 0, which is their mean.
    """
    ids = batch.get("channel_ids")
    if ids is None:
        return {"images": images}
    if isinstance(model.config, ChannelMambaConfig | ChannelViTConfig):
        return {"images": images, "channel_ids": ids}
    return {"images": spread_channels(images, ids, model.config.channels)}


def spread_channels(
    images: Images, channel_ids: ChannelIds, channels: int
) -> Float[Array, "b h w channels"]:
    """Put the channels of `images` `b h w k` at their places among `channels`, with zeros in all others."""
    places = jax.nn.one_hot(channel_ids, channels, dtype=images.dtype)
    places = jnp.broadcast_to(places, (images.shape[0], *places.shape[1:]))
    return jnp.einsum("bhwk,bkc->bhwc", images, places, precision="highest")

"""Embed images as one token per patch and channel: a shared patch kernel, plus an embedding of the channel.

token[r, c, k] = kernel · patch[r, c] of channel k + bias + channel_embed[id of channel k]

Source: FastVim, section 3.3, and Bao et al., Channel Vision Transformers (2024).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from fastvim_jax.errors import UserError, counted
from fastvim_jax.layers import initializers as init
from fastvim_jax.layers.linear import product
from fastvim_jax.layers.patch_embed import check_image_array
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Images
from pallas_kernels.sharding import cast_parameter

ChannelIds = Int[Array, "#b k"] | Int[np.ndarray, "#b k"]
"""Number of each of the input's k channels among the model's channels: for all images (b = 1), or for each image."""


class ChannelPatchProjection(nnx.Module):
    """Kernel `p q 1 d` and bias `d`, both uniform in ±1/√(p q), shared by all channels."""

    def __init__(self, patch: tuple[int, int], width: int, *, precision: Precision, rngs: nnx.Rngs):
        uniform = init.fan_in_uniform(patch[0] * patch[1])
        self.kernel = nnx.Param(uniform(rngs.params(), (*patch, 1, width), precision.params))
        self.bias = nnx.Param(uniform(rngs.params(), (width,), precision.params))


class ChannelPatchEmbed(nnx.Module):
    """Project every patch of every channel with one kernel and add the channel's embedding."""

    def __init__(
        self,
        patch: tuple[int, int],
        stride: tuple[int, int],
        channels: int,
        width: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.patch, self.stride, self.channels = patch, stride, channels
        self.precision = precision
        self.proj = ChannelPatchProjection(patch, width, precision=precision, rngs=rngs)
        self.channel_embed = nnx.Param(
            normal(0.02)(rngs.params(), (channels, width), precision.params)
        )

    def __call__(
        self, images: Images, channel_ids: ChannelIds | None = None
    ) -> Float[Array, "b rows columns k d"]:
        """Embed images `b h w k` as `b rows columns k d`, float32 or wider; rows = (h - p) // stride + 1.

        Pixels at the bottom and right that fill no patch are not read, as in a convolution without padding.

        Args:
            images: any k up to the model's number of channels.
            channel_ids: the model's channel for each of the k channels; None: the first k. A traced id outside the
                model's channels gives NaN, because traced values cannot be checked.

        Raises:
            UserError: more channels than the model has, ids that do not fit, or an image smaller than one patch.
        """
        images = check_image_array(images)
        ids = check_channel_ids(images.shape, channel_ids, self.channels)
        check_size(images.shape[1:3], self.patch)
        if self.precision.activations == "compute":  # Round the images once, as PatchEmbed does.
            images = images.astype(self.precision.compute)
        patches = cut_patches(images, self.patch, self.stride)
        kernel = rearrange(self.proj.kernel[...], "p q 1 d -> (p q) d")
        projected = product(patches, kernel, self.precision.compute, self.precision.lax)
        embedding = jnp.take(self.channel_embed[...], jnp.asarray(ids), axis=0, mode="fill")
        offset = self.proj.bias[...] + embedding[:, None, None]
        return projected + cast_parameter(offset, projected.dtype, projected)


def cut_patches(
    images: Images, patch: tuple[int, int], stride: tuple[int, int]
) -> Float[Array, "b rows columns k pixels"]:
    """Cut images into patches that begin every `stride` pixels. They overlap if `stride` is smaller than `patch`."""
    rows, columns = strided_grid((images.shape[1], images.shape[2]), patch, stride)
    if patch == stride:
        whole = images[:, : rows * patch[0], : columns * patch[1]]
        return rearrange(whole, "b (h p) (w q) k -> b h w k (p q)", p=patch[0], q=patch[1])
    down = np.arange(rows)[:, None] * stride[0] + np.arange(patch[0])
    across = np.arange(columns)[:, None] * stride[1] + np.arange(patch[1])
    return rearrange(images[:, down][:, :, :, across], "b h p w q k -> b h w k (p q)")


def strided_grid(
    size: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int]:
    """Count the rows and columns of patches that lie wholly inside an image of `size` (height, width)."""
    rows, columns = ((s - p) // step + 1 for s, p, step in zip(size, patch, stride, strict=True))
    return rows, columns


def check_size(size: tuple[int, ...], patch: tuple[int, int]) -> None:
    """Raise UserError if an image of `size` (height, width) is smaller than one patch."""
    if size[0] < patch[0] or size[1] < patch[1]:
        raise UserError(
            f"an image of {size[0]}x{size[1]} pixels is smaller than one {patch[0]}x{patch[1]} patch; resize it first."
        )


def check_channel_ids(
    shape: tuple[int, ...], channel_ids: ChannelIds | None, channels: int
) -> ChannelIds:
    """Return the ids `1 k` or `b k` of the channels of images of `shape` `b h w k`; the first k if None is given.

    Raises:
        UserError: more channels than the model has, or ids that do not fit images and model.
    """
    count = shape[-1]
    if count > channels:
        raise UserError(
            f"images have {counted(count, 'channel')} (shape {shape}, read as batch, height, width, channels) but "
            "the model was "
            f"built for {channels}; it takes any subset of them."
        )
    if channel_ids is None:
        return np.arange(count, dtype=np.int32)[None]
    if channel_ids.shape[1] != count or channel_ids.shape[0] not in (1, shape[0]):
        raise UserError(
            f"channel_ids of shape {channel_ids.shape} do not fit images of shape {shape} (batch, height, width, "
            f"channels): give one id per channel, (1, {count}) or ({shape[0]}, {count})."
        )
    known = not isinstance(channel_ids, jax.core.Tracer)
    if known and np.any((np.asarray(channel_ids) < 0) | (np.asarray(channel_ids) >= channels)):
        raise UserError(
            f"channel_ids {np.unique(np.asarray(channel_ids)).tolist()} name channels that the model does not have: "
            f"it knows 0 to {channels - 1}."
        )
    return channel_ids

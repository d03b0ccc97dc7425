"""Embed the patches of images as a grid of vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.nn.initializers import zeros
from jaxtyping import Array, Float

from fastvim_jax.errors import UserError, counted
from fastvim_jax.layers import initializers as init
from fastvim_jax.layers.linear import product
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Grid, Images
from pallas_kernels.sharding import cast_parameter


class PatchProjection(nnx.Module):
    """Kernel `p q c d` (truncated normal of standard deviation fan_in^-0.5) and bias `d` of the patch embedding."""

    def __init__(
        self,
        patch: tuple[int, int],
        channels: int,
        width: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        fan_in = patch[0] * patch[1] * channels
        # Cut at two of its own standard deviations, a normal keeps 0.88 of it; fan_in^-0.5 is what remains.
        std = fan_in**-0.5 / 0.87962566103423978
        kernel_init = init.truncated_normal(std, 2 * std)
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (*patch, channels, width), precision.params)
        )
        self.bias = nnx.Param(zeros(rngs.params(), (width,), precision.params))


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, each projected to `width`; the image is zero-padded at the bottom and right."""

    def __init__(
        self,
        patch: tuple[int, int],
        channels: int,
        width: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.patch, self.channels, self.precision = patch, channels, precision
        self.proj = PatchProjection(patch, channels, width, precision=precision, rngs=rngs)

    def __call__(self, images: Images) -> Grid:
        """Embed images `b h w c` as `b rows columns d`, float32 or wider; rows = ceil(h / p).

        Raises:
            UserError: images of another rank, dtype or channel count, or smaller than one patch.
        """
        return self.project(self.cut(images))

    def cut(self, images: Images) -> Float[Array, "b rows columns v"]:
        """Cut images `b h w c` into patch vectors (p q c), zero-padded at the bottom and right."""
        images = check_images(images, self.channels, self.patch)
        _, height, width, _ = images.shape
        p, q = self.patch
        if self.precision.activations == "compute":  # rounded once, as tokens are then
            images = images.astype(self.precision.compute)
        padding = ((0, 0), (0, -height % p), (0, -width % q), (0, 0))
        # One transposition of rows of q * c numbers: XLA's CPU backend copies more slowly with q and c apart.
        rows = rearrange(jnp.pad(images, padding), "b (h p) (w q) c -> b h p w (q c)", p=p, q=q)
        return rearrange(rows, "b h p w v -> b h w (p v)")

    def project(self, patches: Float[Array, "*rows v"]) -> Float[Array, "*rows d"]:
        """Project patch vectors to the model's width, float32 or wider."""
        kernel = rearrange(self.proj.kernel[...], "p q c d -> (p q c) d")
        projected = product(patches, kernel, self.precision.compute, self.precision.lax)
        return projected + cast_parameter(self.proj.bias[...], projected.dtype, projected)


class GridSize(NamedTuple):
    """Rows and columns of tokens."""

    rows: int
    columns: int


def grid_of(size: tuple[int, int], patch: tuple[int, int]) -> GridSize:
    """Count the rows and columns of patches that cover an image of `size` (height, width)."""
    return GridSize(-(-size[0] // patch[0]), -(-size[1] // patch[1]))


def check_images(images: Any, channels: int, patch: tuple[int, int]) -> jax.Array:
    """Return `images` as a JAX array, once they are what a model takes.

    Args:
        images: floats `b h w channels` of at least one patch.
        channels: that the model was built for.
        patch: height and width of a patch.

    Raises:
        UserError: rank, dtype, channel count or size do not fit. The message names the expected and the given one.
    """
    images = check_image_array(images)
    shape, given = images.shape, f"got {images.dtype} of shape {images.shape}"
    if shape[3] != channels:
        fix = (
            " They look channels-first: pass images.transpose(0, 2, 3, 1)."
            if shape[1] == channels
            else ""
        )
        raise UserError(
            f"images have {counted(shape[3], 'channel')} ({given}, read as batch, height, width, channels) "
            f"but the model was built for {channels}.{fix}"
        )
    if shape[1] < patch[0] or shape[2] < patch[1]:
        raise UserError(
            f"an image of {shape[1]}x{shape[2]} pixels is smaller than one {patch[0]}x{patch[1]} patch "
            f"({given}); resize it first."
        )
    return images


def check_image_array(images: Any) -> jax.Array:
    """Return `images` as a JAX array, once it is an array of floats with four axes; see `check_images`."""
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or dtype is None:
        raise UserError(
            f"images must be an array `b h w c` (batch, height, width, channels), not {type(images).__name__}."
        )
    given = f"got {dtype} of shape {tuple(shape)}"
    if len(shape) != 4:
        fix = " Add a batch axis: images[None]." if len(shape) == 3 else ""
        raise UserError(f"images must be `b h w c` (batch, height, width, channels); {given}.{fix}")
    if not jnp.issubdtype(dtype, jnp.floating):
        pixels = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
        fix = (
            " These look like pixels: scale and normalise them as in training, "
            "for example (images / 255 - mean) / std."
        )
        raise UserError(f"images must be normalised floats; {given}.{fix if pixels else ''}")
    return jnp.asarray(images)

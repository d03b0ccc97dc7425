"""Images to a grid of patch embeddings."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.nn.initializers import zeros
from jaxtyping import Array, Float

from fastvim_jax.errors import UserError
from fastvim_jax.layers import initializers as init
from fastvim_jax.layers.linear import product
from fastvim_jax.precision import Precision
from fastvim_jax.typing import Grid, Images


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
        """Images `b h w c` → `b rows columns d`, float32 or wider, rows = ceil(h / p).

        Raises:
            UserError: wrong channel count, or an image smaller than one patch.
        """
        return self.project(self.cut(images))

    def cut(self, images: Images) -> Float[Array, "b rows columns v"]:
        """Cut images `b h w c` into patch vectors (p q c), zero-padded at the bottom and right."""
        _, height, width, channels = images.shape
        p, q = self.patch
        if channels != self.channels:
            raise UserError(
                f"images have {channels} channels (shape {images.shape}, read as batch, height, width, channels) "
                f"but the model was built for {self.channels}."
            )
        if height < p or width < q:
            raise UserError(
                f"an image of {height}x{width} pixels is smaller than one {p}x{q} patch; resize it first."
            )
        if self.precision.activations == "compute":  # rounded once, as tokens are then
            images = images.astype(self.precision.compute)
        padding = ((0, 0), (0, -height % p), (0, -width % q), (0, 0))
        return rearrange(jnp.pad(images, padding), "b (h p) (w q) c -> b h w (p q c)", p=p, q=q)

    def project(self, patches: Float[Array, "*rows v"]) -> Float[Array, "*rows d"]:
        """Project patch vectors to the model's width, float32 or wider."""
        kernel = rearrange(self.proj.kernel[...], "p q c d -> (p q c) d")
        projected = product(patches, kernel, self.precision.compute, self.precision.lax)
        return projected + self.proj.bias[...].astype(projected.dtype)


def grid_of(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that cover an image of `size` (height, width)."""
    return -(-size[0] // patch[0]), -(-size[1] // patch[1])

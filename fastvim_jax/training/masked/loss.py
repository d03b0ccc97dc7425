"""Compute the reconstruction target and loss of masked autoencoders.

target = patches of the image, each with mean 0 and variance 1 if `normalise` (unbiased variance, 1e-6 added)
loss   = mean of (prediction - target)^2 over a patch vector, averaged over the removed patches
"""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fastvim_jax.typing import Images


def patchify(images: Images, patch: tuple[int, int]) -> Float[Array, "b l v"]:
    """Cut images `b h w c` into patch vectors `b l (p q c)`. Patches come row by row; channels vary fastest."""
    p, q = patch
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=q)


def unpatchify(
    patches: Float[Array, "b l v"], grid: tuple[int, int], patch: tuple[int, int]
) -> Images:
    """Put patch vectors together into images, the inverse of `patchify`."""
    (rows, columns), (p, q) = grid, patch
    return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, w=columns, p=p, q=q)


def patch_statistics(
    patches: Float[Array, "b l v"],
) -> tuple[Float[Array, "b l 1"], Float[Array, "b l 1"]]:
    """Return mean and standard deviation of every patch, as `pixel_loss` normalises by them."""
    mean = patches.mean(axis=-1, keepdims=True)
    variance = patches.var(axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + 1e-6)


def pixel_loss(
    images: Images,
    predicted: Float[Array, "b l v"],
    removed: Float[Array, "b l"],
    patch: tuple[int, int],
    *,
    normalise: bool = True,
) -> Float[Array, ""]:
    """Return the mean squared error over removed patches, in float32 or wider.

    Args:
        images: The network's input, normalised.
        predicted: Patch vectors, in the order of `patchify`.
        removed: 1 where a patch was removed.
        patch: Height and width of a patch.
        normalise: Predict patches normalised one by one (`norm_pix_loss`), or the pixels as they are.
    """
    error = patch_errors(images, predicted, patch, normalise=normalise)
    weight = removed.astype(error.dtype)
    return jnp.sum(error * weight) / jnp.sum(weight)


def patch_errors(
    images: Images,
    predicted: Float[Array, "b l v"],
    patch: tuple[int, int],
    *,
    normalise: bool = True,
) -> Float[Array, "b l"]:
    """Return the mean squared error of every patch, in float32 or wider; see `pixel_loss`."""
    wide = jnp.promote_types(jnp.promote_types(images.dtype, predicted.dtype), jnp.float32)
    target = patchify(images.astype(wide), patch)
    if normalise:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    return jnp.mean(jnp.square(predicted.astype(wide) - target), axis=-1)

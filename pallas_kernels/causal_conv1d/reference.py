"""The definition of the causal convolution, tap by tap."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dtypes import wide_dtype


def conv(
    x: Float[Array, "b l e"],
    kernel: Float[Array, "k e"],
    bias: Float[Array, " e"] | None,
    *,
    activation: str | None,
    reverse: bool,
) -> Float[Array, "b l e"]:
    """Compute y_t = act(bias + sum over j of kernel_j x_{t - (k-1) + j}), with t + (k-1) - j when reversed."""
    wide = wide_dtype(x, kernel)
    width, length = kernel.shape[0], x.shape[1]
    if reverse:
        x = jnp.flip(x, 1)
    padded = jnp.pad(x.astype(wide), ((0, 0), (width - 1, 0), (0, 0)))
    taps = [padded[:, j : j + length] * kernel[j].astype(wide) for j in range(width)]
    y = functools.reduce(jnp.add, taps)
    if bias is not None:
        y = y + bias.astype(wide)
    if activation == "silu":
        y = jax.nn.silu(y)
    if reverse:
        y = jnp.flip(y, 1)
    return y.astype(x.dtype)

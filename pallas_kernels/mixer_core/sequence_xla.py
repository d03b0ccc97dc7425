"""The core of mixers that pool nothing without fusion by hand: the definition, and every other platform's path."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.causal_conv1d import xla as conv1d
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.mixer_core.types import Norm


class Convolutions(NamedTuple):
    """Of both directions, forward then backward; the last tap meets the current token."""

    kernels: Float[Array, "2 k e"]
    biases: Float[Array, "2 e"]


Pair = tuple[Float[Array, "b l e"], Float[Array, "b l e"]]


def front(xz: Float[Array, "b l e2"], convolutions: Convolutions) -> Float[Array, "2 b l e"]:
    """Convolution and SiLU of both directions, in xz's dtype."""
    x, _ = jnp.split(xz, 2, axis=-1)
    return jnp.stack(
        [
            conv1d.conv(x, kernel, bias, activation="silu", reverse=reverse)
            for kernel, bias, reverse in zip(*convolutions, (False, True), strict=True)
        ]
    )


def gate(y: Pair, z: Float[Array, "b l e"], norm: Norm, eps: float) -> Float[Array, "b l e"]:
    """LayerNorm of the directions' mean · silu(z), in z's dtype; computed in float32 or wider."""
    wide = wide_dtype(z.dtype)
    s = (y[0].astype(wide) + y[1].astype(wide)) / 2
    s = s - jnp.mean(s, axis=-1, keepdims=True)
    s = s * jax.lax.rsqrt(jnp.mean(s * s, axis=-1, keepdims=True) + eps)
    s = s * norm.scale.astype(wide) + norm.shift.astype(wide)
    return (s * jax.nn.silu(z.astype(wide))).astype(z.dtype)


def back(xz: Float[Array, "b l e2"], y: Pair, norm: Norm, *, eps: float) -> Float[Array, "b l e"]:
    """Everything after the scan: see `gate`."""
    _, z = jnp.split(xz, 2, axis=-1)
    return gate(y, z, norm, eps)


def back_gradients(
    xz: jax.Array, y: Pair, norm: Norm, out_bar: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array, Norm]:
    """Gradients of y (the same for both directions), of xz as far as z goes (the first half is left), and of norm.

    Both arrays are of xz's dtype. Written side by side here, the halves of xz's gradient need no pass to join them.
    """
    _, z = jnp.split(xz, 2, axis=-1)
    _, pull = jax.vjp(lambda y, z, norm: gate(y, z, norm, eps), y, z, norm)
    y_bar, z_bar, norm_bar = pull(out_bar)
    half = ((0, 0), (0, 0), (z.shape[-1], 0))
    return y_bar[0].astype(xz.dtype), jnp.pad(z_bar, half), norm_bar


def front_gradients(
    xz: jax.Array, c_bar: jax.Array, xz_bar: jax.Array, convolutions: Convolutions
) -> tuple[jax.Array, Convolutions]:
    """Compute the gradient of xz, whose second half is there already, and those of the convolutions."""
    _, pull = jax.vjp(front, xz, convolutions)
    x_bar, convolutions_bar = pull(c_bar)
    width = xz.shape[-1] // 2
    return xz_bar.at[..., :width].set(x_bar[..., :width]), convolutions_bar

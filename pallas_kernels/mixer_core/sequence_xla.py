"""Define what the core of mixers that pool nothing computes, in plain JAX. Platforms without kernels run this."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.causal_conv1d import xla as conv1d
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.mixer_core.narrow import on_channels
from pallas_kernels.mixer_core.types import Norm
from pallas_kernels.mixer_core.xla import normalise


class Convolutions(NamedTuple):
    """Convolutions of both directions, forward then backward. The last tap multiplies the current token."""

    kernels: Float[Array, "2 k e"]
    biases: Float[Array, "2 e"]


Pair = tuple[Float[Array, "b l e"], Float[Array, "b l e"]]


def front(xz: Float[Array, "b l e2"], convolutions: Convolutions) -> Float[Array, "2 b l e"]:
    """Apply convolution and SiLU in both directions, in xz's dtype."""
    x, _ = jnp.split(xz, 2, axis=-1)
    return jnp.stack(
        [
            conv1d.conv(x, kernel, bias, activation="silu", reverse=reverse)
            for kernel, bias, reverse in zip(*convolutions, (False, True), strict=True)
        ]
    )


def gate(
    y: Pair, z: Float[Array, "b l e"], norm: Norm, eps: float, norm_kind: str = "layer"
) -> Float[Array, "b l e"]:
    """Compute norm(mean of both directions) · silu(z) in float32 or wider, and return it in z's dtype."""
    wide = wide_dtype(z.dtype)
    s = (y[0].astype(wide) + y[1].astype(wide)) / 2
    s = normalise(s, norm, norm_kind, eps)
    return (s * jax.nn.silu(z.astype(wide))).astype(z.dtype)


def _gate(eps: float, padding: int, norm_kind: str) -> Callable[..., jax.Array]:
    """Return `gate` of (y, z, norm), whose last `padding` channels are zeros and count in no norm."""
    run = lambda y, z, norm: gate(y, z, norm, eps, norm_kind)  # noqa: E731
    return on_channels(run, padding) if padding else run


def back(
    xz: Float[Array, "b l e2"],
    y: Pair,
    norm: Norm,
    *,
    eps: float,
    padding: int = 0,
    norm_kind: str = "layer",
) -> Float[Array, "b l e"]:
    """Compute everything after the scan: see `gate`."""
    _, z = jnp.split(xz, 2, axis=-1)
    return _gate(eps, padding, norm_kind)(y, z, norm)


def back_gradients(
    xz: jax.Array,
    y: Pair,
    norm: Norm,
    out_bar: jax.Array,
    *,
    eps: float,
    padding: int = 0,
    norm_kind: str = "layer",
) -> tuple[jax.Array, jax.Array, Norm]:
    """Compute the gradients of y (the same for both directions), of z and of norm.

    The gradient of z is the second half of an array like xz, whose first half is zero: `front_gradients` writes the
    gradient of x there, so no later pass has to join the two. Both arrays have xz's dtype.
    """
    _, z = jnp.split(xz, 2, axis=-1)
    _, pull = jax.vjp(_gate(eps, padding, norm_kind), y, z, norm)
    y_bar, z_bar, norm_bar = pull(out_bar)
    half = ((0, 0), (0, 0), (z.shape[-1], 0))
    return y_bar[0].astype(xz.dtype), jnp.pad(z_bar, half), norm_bar


def front_gradients(
    xz: jax.Array, c_bar: jax.Array, xz_bar: jax.Array, convolutions: Convolutions
) -> tuple[jax.Array, Convolutions]:
    """Write the gradient of x into the first half of `xz_bar`; return it and the gradients of the convolutions."""
    _, pull = jax.vjp(front, xz, convolutions)
    x_bar, convolutions_bar = pull(c_bar)
    width = xz.shape[-1] // 2
    return xz_bar.at[..., :width].set(x_bar[..., :width]), convolutions_bar

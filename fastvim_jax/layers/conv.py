"""Define the depthwise causal convolution that comes before the scan."""

from __future__ import annotations

from flax import nnx

from fastvim_jax.layers import initializers as init
from fastvim_jax.typing import Inner
from pallas_kernels import causal_conv1d


class DepthwiseConv(nnx.Module):
    """Apply a causal depthwise convolution, then SiLU.

    The kernel is `width channels`. Its last tap multiplies the current token.
    """

    def __init__(self, channels: int, width: int, *, bias: bool, dtype, rngs: nnx.Rngs):
        uniform = init.fan_in_uniform(width)
        self.kernel = nnx.Param(uniform(rngs.params(), (width, channels), dtype))
        self.bias = (
            nnx.Param(uniform(rngs.params(), (channels,), dtype)) if bias else nnx.data(None)
        )

    def __call__(self, x: Inner, *, reverse: bool) -> Inner:
        bias = None if self.bias is None else self.bias[...]
        return causal_conv1d(x, self.kernel[...], bias, activation="silu", reverse=reverse)

"""Helpers of the kernels before and after the scans: register layouts, convolution, SiLU.

`front` and `back` kernels use them for pooled tokens, and the sequence kernels for tokens that are not pooled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.types import Norm
from pallas_kernels.mosaic import LOG2E, WARPS, reciprocal, reduced, tiled

CHANNELS = 128  # Channels of a block of 128 threads that own one channel each.
BLOCK = 128  # Channels of one bulk copy: the copy engine moves at most 256 along an axis.


def logistic(x: jax.Array, layout, interpret: bool, dtype) -> jax.Array:
    """Compute 1 / (1 + exp(-x)) in float32; it is 0 where exp(-x) overflows.

    For tokens of 16 bits (`dtype`) use the hardware's tanh, because it takes one special-function instruction instead
    of two. Its error is at most 2^-12, an eighth of the error of rounding to bfloat16.
    """
    if jnp.dtype(dtype).itemsize == 2:
        return lax.tanh(x * 0.5) * 0.5 + 0.5
    return reciprocal(lax.exp2(x * -LOG2E) + 1.0, layout, interpret)


def silu(x: jax.Array, layout, interpret: bool, dtype) -> jax.Array:
    """Compute x · `logistic`(x)."""
    return scaled_silu(x * silu_scale(dtype), layout, interpret, dtype)


def silu_scale(dtype) -> float:
    """Return the factor of the argument of `scaled_silu`."""
    return 0.5 if jnp.dtype(dtype).itemsize == 2 else 1.0


def scaled_silu(x: jax.Array, layout, interpret: bool, dtype) -> jax.Array:
    """Compute silu(x / `silu_scale`(dtype)). Parameters that make x can hold the factor, which saves a product."""
    if jnp.dtype(dtype).itemsize == 2:
        return lax.tanh(x) * x + x
    return x * logistic(x, layout, interpret, dtype)


def row_layout(*shape: int, owned: int = 1):
    """Return the layout in which every thread owns `owned` neighbouring channels of each 128 · `owned`."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=owned)


def read_row(ref, layout) -> jax.Array:
    """Load a row as float32."""
    return plgpu.load(ref, layout=layout).astype(jnp.float32)


def convolve(window: list[jax.Array], kernel: list[jax.Array], bias: jax.Array, backward: bool):
    """Compute one causal convolution at the middle token of `window`.

    Args:
        window: tokens from `taps - 1` before the middle one to `taps - 1` after it.
        kernel: one vector of channels per tap. The last tap multiplies the middle token in both directions.
        bias: one vector of channels.
        backward: read the tokens after the middle one instead of those before it.
    """
    middle = len(kernel) - 1
    total = bias
    for j, tap in enumerate(kernel):
        offset = middle - j if backward else j - middle
        total = total + tap * window[middle + offset]
    return total


class Convolutions:
    """Both directions' convolutions with SiLU, and the mean of their skips, for threads that own channels.

    Args:
        kernels, biases, D: references to ``2 k e``, ``2 e`` and ``2 e`` float32.
        channels: the slice of channels.
        dtype: of the tokens.
        interpret: run in Pallas' interpreter.
        layout: of the channels; by default a thread owns one.
    """

    def __init__(self, kernels, biases, D, channels, dtype, interpret: bool, *, layout=None):
        self.layout, self.dtype, self.interpret = layout or row_layout(CHANNELS), dtype, interpret
        row = lambda ref: read_row(ref, self.layout)  # noqa: E731
        scale = silu_scale(dtype)
        taps = range(kernels.shape[1])
        self.kernel = [[row(kernels.at[d, j, channels]) * scale for j in taps] for d in (0, 1)]
        self.bias = [row(biases.at[d, channels]) * scale for d in (0, 1)]
        self.D = [row(D.at[d, channels]) * 0.5 for d in (0, 1)]

    def of(self, window: list[jax.Array]) -> list[jax.Array]:
        """Return both directions' values at the middle token of `window`."""
        return [
            scaled_silu(
                convolve(window, self.kernel[d], self.bias[d], bool(d)),
                self.layout,
                self.interpret,
                self.dtype,
            )
            for d in (0, 1)
        ]

    def skip(self, both: list[jax.Array]) -> jax.Array:
        """Return the mean of both skips, rounded to the tokens' dtype."""
        return (self.D[0] * both[0] + self.D[1] * both[1]).astype(self.dtype)


class TokenLayouts:
    """Define how the registers of a warpgroup hold whole tokens, so that a norm over channels stays in few warps.

    Tokens are arrays ``(at_once, blocks, 128)``: `at_once` tokens of `blocks` times 128 channels. Each token is held by
    one warp or several.

    Attributes:
        tokens: layout of ``(at_once, blocks, 128)``.
        channels: layout of a vector over channels, ``(blocks, 128)``.
        statistic: layout of one number per token, ``(at_once,)``.
    """

    def __init__(self, blocks: int, padding: int = 0, norm_kind: str = "layer"):
        """Lay out tokens of `blocks` times 128 channels; the last `padding` of these are zeros and count in no mean."""
        self.blocks, self.real, self.norm_kind = blocks, blocks * BLOCK - padding, norm_kind
        self.at_once = 4 if blocks <= 4 or blocks % 2 else 2 if blocks <= 8 or blocks % 4 else 1
        base, self.tokens = tiled(
            ((self.at_once, 4 // self.at_once, BLOCK), (1, 1, BLOCK), (1, 1, 4)),
            (-9, -8),
            (-4,),
            -1,
        )
        self.channels = reduced(base, (0,))
        self.statistic = reduced(base, (1, 2))

    def over_tokens(self, vector: jax.Array) -> jax.Array:
        """Broadcast a vector over channels to all tokens."""
        spread = lax.broadcast_in_dim(vector, (self.at_once, *vector.shape), (1, 2))
        return plgpu.layout_cast(spread, self.tokens)

    def over_channels(self, statistic: jax.Array) -> jax.Array:
        """Broadcast one number per token to all channels."""
        spread = lax.broadcast_in_dim(statistic, (self.at_once, self.blocks, BLOCK), (0,))
        return plgpu.layout_cast(spread, self.tokens)

    def mean(self, x: jax.Array) -> jax.Array:
        """Compute the mean over the channels of each token."""
        if self.at_once == 4:  # One warp holds a token: add up its registers before its lanes.
            total = jnp.sum(jnp.sum(x, axis=1), axis=1)
        else:
            total = jnp.sum(jnp.sum(x, axis=2), axis=1)
        return total * (1.0 / self.real)

    def normalise(self, s: jax.Array, eps: float) -> tuple[jax.Array, jax.Array | None]:
        """Return the normalised tokens, and what they were multiplied by (None without a norm)."""
        if self.norm_kind == "none":
            return s, None
        if self.norm_kind == "layer":
            s = self.real_channels(s - self.over_channels(self.mean(s)))
        inverse = self.over_channels(lax.rsqrt(self.mean(s * s) + eps))
        return s * inverse, inverse

    def scale_and_shift(self, s: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
        """Apply the norm's parameters, given for all tokens, to normalised tokens."""
        return s if self.norm_kind == "none" else s * scale + shift

    def normalise_gradient(
        self,
        g: jax.Array,
        s: jax.Array,
        scale: jax.Array,
        inverse: jax.Array | None,
    ) -> jax.Array:
        """Return the gradient of the tokens before the norm.

        Args:
            g: gradient behind scale and shift.
            s, inverse: what `normalise` returned.
            scale: of the norm, for all tokens.
        """
        if inverse is None:
            return g
        g = g * scale
        if self.norm_kind == "layer":
            g = self.real_channels(g - self.over_channels(self.mean(g)))
        return (g - s * self.over_channels(self.mean(g * s))) * inverse

    def real_channels(self, x: jax.Array) -> jax.Array:
        """Set the channels that count in no mean to zero."""
        if self.real == self.blocks * BLOCK:
            return x
        index = lambda axis: plgpu.layout_cast(  # noqa: E731
            lax.broadcasted_iota(jnp.int32, x.shape, axis), self.tokens
        )
        return jnp.where(index(1) * BLOCK + index(2) < self.real, x, 0.0)


def owned_blocks(blocks: int) -> int:
    """Return how many of the ``blocks`` of channels the threads own at a time: 3, 2 or 1, whichever divides them."""
    return next(n for n in (3, 2, 1) if blocks % n == 0)


def summed(parts: jax.Array, norm: Norm, norm_kind: str) -> Norm:
    """Add up the parts of the gradients of a norm's parameters, which are zero if there is no norm."""
    if norm_kind == "none":
        return jax.tree.map(jnp.zeros_like, norm)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), Norm(*parts.sum(1)), norm)


def blocked(x: jax.Array) -> jax.Array:
    """Reshape ``... channels`` to ``... blocks 128``."""
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def whole_tokens_unsupported(tokens: int, width: int, unit: int, widest: int) -> str | None:
    """Return why warps that own whole tokens, in parts of `unit` channels, cannot take these tokens, or None."""
    if width % unit or width > widest:
        return f"{width} channels are no multiple of {unit} up to {widest}"
    return f"{tokens} tokens are fewer than {WARPS}" if tokens < WARPS else None

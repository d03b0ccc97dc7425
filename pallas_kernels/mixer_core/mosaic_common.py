"""What the kernels around the scans share, pooled or not: how threads own channels and tokens, convolution, SiLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import LOG2E, reciprocal, reduced, tiled

CHANNELS = 128  # of a block of threads: one a thread
BLOCK = 128  # channels; the copy engine moves at most 256 along an axis


def logistic(x: jax.Array, layout, interpret: bool, dtype) -> jax.Array:
    """Compute 1 / (1 + exp(-x)) in float32; for large -x the reciprocal is 0.

    For tokens of half precision use the hardware's tanh, because it is one special function instruction and not two.
    Its error of up to 2^-12 is an eighth of what rounding to bfloat16 may add.
    """
    if jnp.dtype(dtype).itemsize == 2:
        return lax.tanh(x * 0.5) * 0.5 + 0.5
    return reciprocal(lax.exp2(x * -LOG2E) + 1.0, layout, interpret)


def silu(x: jax.Array, layout, interpret: bool, dtype) -> jax.Array:
    """Compute x · `logistic`(x)."""
    if jnp.dtype(dtype).itemsize == 2:
        half = x * 0.5
        return lax.tanh(half) * half + half
    return x * logistic(x, layout, interpret, dtype)


def row_layout(*shape: int):
    """Give every thread one channel of each 128."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def read_row(ref, layout) -> jax.Array:
    """Load a row as float32."""
    return plgpu.load(ref, layout=layout).astype(jnp.float32)


def convolve(window: list[jax.Array], kernel: list[jax.Array], bias: jax.Array, backward: bool):
    """Convolve at the window's middle token; backward, the window looks ahead.

    The last tap meets the middle token in both directions.
    """
    middle = len(kernel) - 1
    total = bias
    for j, tap in enumerate(kernel):
        offset = middle - j if backward else j - middle
        total = total + tap * window[middle + offset]
    return total


class TokenLayouts:
    """Register layouts of a few whole tokens, ``(at_once, blocks, 128)``: one or more warps hold a token."""

    def __init__(self, blocks: int):
        self.blocks = blocks
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
        spread = lax.broadcast_in_dim(vector, (self.at_once, *vector.shape), (1, 2))
        return plgpu.layout_cast(spread, self.tokens)

    def over_channels(self, statistic: jax.Array) -> jax.Array:
        spread = lax.broadcast_in_dim(statistic, (self.at_once, self.blocks, BLOCK), (0,))
        return plgpu.layout_cast(spread, self.tokens)

    def mean(self, x: jax.Array) -> jax.Array:
        if self.at_once == 4:  # a warp holds whole tokens: add up its registers first
            total = jnp.sum(jnp.sum(x, axis=1), axis=1)
        else:
            total = jnp.sum(jnp.sum(x, axis=2), axis=1)
        return total * (1.0 / (self.blocks * BLOCK))


def owned_blocks(blocks: int) -> int:
    """Return how many blocks of channels the threads own at a time: up to three."""
    return next(n for n in (3, 2, 1) if blocks % n == 0)


def blocked(x: jax.Array) -> jax.Array:
    """Reshape ``... channels`` to ``... blocks 128``."""
    return x.reshape(*x.shape[:-1], -1, BLOCK)

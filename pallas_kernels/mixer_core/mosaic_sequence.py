"""Run the kernels of mixers that pool nothing behind the interface of `sequence_xla`, and cut them into blocks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.mixer_core import mosaic_sequence_back, mosaic_sequence_front
from pallas_kernels.mixer_core.mosaic_common import BLOCK, CHANNELS, TokenLayouts, summed
from pallas_kernels.mixer_core.mosaic_sequence_back import Rows
from pallas_kernels.mixer_core.mosaic_sequence_front import Sequences
from pallas_kernels.mixer_core.sequence_xla import Convolutions, Pair
from pallas_kernels.mixer_core.types import Norm
from pallas_kernels.mosaic import PROCESSORS, SHARED_MEMORY

SEGMENTS = (8, 12, 16, 20, 24)  # tokens of a tile, written out in the kernels
TILE = 8 * 1024  # bytes of an array that a tile of the back holds


def unsupported(xz: Any, convolutions: Any) -> str | None:
    """Return why the kernels cannot take this call, or None. Of arrays only shapes and dtypes matter."""
    if xz.dtype not in (jnp.float32, jnp.bfloat16):
        return f"xz is {xz.dtype}, and the kernels compute in float32"
    if not all(isinstance(size, int) for size in xz.shape):
        return f"xz {xz.shape} has a symbolic size"
    if min(xz.shape) < 1:
        return f"xz {xz.shape} is empty"
    width, taps = xz.shape[2] // 2, convolutions.kernels.shape[1]
    if width % BLOCK:
        return f"{width} channels are not made of whole blocks of {BLOCK}"
    if not 2 <= taps <= 8:
        return f"convolutions of width {taps} are not between 2 and 8"
    if _bytes_of_rows(cut_rows(xz, gradients=True), xz, gradients=True) > SHARED_MEMORY - 4096:
        return f"tiles of {width} channels do not fit into shared memory"
    return None


def tiles_of_a_block(tiles: int, others: int, resident: int, *, start: float, fewest: int) -> int:
    """Choose the number of tiles per block that costs least: waves of blocks, times (tiles per block + ``start``).

    If possible, leave at least ``fewest`` blocks.
    """

    def blocks(per_block):
        return others * math.ceil(tiles / per_block)

    def cost(per_block):
        waves = math.ceil(blocks(per_block) / (PROCESSORS * resident))
        return waves * (per_block + start)

    enough = [n for n in range(1, min(tiles, 32) + 1) if blocks(n) >= fewest]
    return min(enough or [1], key=lambda per_block: (cost(per_block), per_block))


def _resident(used: int, most: int) -> int:
    """Return how many blocks a processor's shared memory and its registers (``most``) hold."""
    return max(1, min(most, SHARED_MEMORY // (used + 1024)))


def cut_sequences(xz: jax.Array, taps: int, *, gradients: bool) -> Sequences:
    """Choose, of the segments that leave room for four blocks, the one with the least padding and halo."""
    batch, length, width = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    halo = taps - 1

    def used(segment):
        """Return the bytes of shared memory that a block needs."""
        rows = 7 * segment + 8 * halo if gradients else 4 * segment + 4 * halo
        return rows * CHANNELS * xz.dtype.itemsize

    fitting = [s for s in SEGMENTS if used(s) <= SHARED_MEMORY // 4 - 1024]
    reread = halo if gradients else 2
    segment = min(fitting or SEGMENTS[:1], key=lambda s: (math.ceil(length / s) * (s + reread), s))
    resident = _resident(used(segment), 4 if gradients else 8)
    columns = batch * (width // CHANNELS)
    # Make many blocks, because memory is not these kernels' only limit: at every tile four warps wait for each other.
    per_block = tiles_of_a_block(
        math.ceil(length / segment), columns, resident, start=1.5, fewest=4 * PROCESSORS
    )
    return Sequences(batch, length, width, taps, segment, per_block)


def cut_rows(xz: Any, *, gradients: bool, padding: int = 0, norm_kind: str = "layer") -> Rows:
    """Choose tiles of a few KiB that are whole groups of tokens."""
    tokens, width = xz.shape[0] * xz.shape[1], xz.shape[2] // 2
    of_token = width * xz.dtype.itemsize
    tile = max(2 ** int(math.log2(max(1, TILE // of_token))), TokenLayouts(width // BLOCK).at_once)
    cut = Rows(tokens, width, tile, 1, padding, norm_kind)
    used = _bytes_of_rows(cut, xz, gradients=gradients)
    resident = _resident(used, 4 if gradients else 6)
    per_block = tiles_of_a_block(cut.tiles, 1, resident, start=0.5, fewest=1)
    return dataclasses.replace(cut, per_block=per_block)


def _bytes_of_rows(cut: Rows, xz: Any, *, gradients: bool) -> int:
    """Return the bytes of shared memory that a block of the back needs."""
    tiles = 2 * (4 if gradients else 3) * cut.tile * xz.dtype.itemsize
    sums = 4 * TokenLayouts(cut.blocks).at_once if gradients else 0
    return (tiles + sums) * cut.width


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def front(xz: jax.Array, convolutions: Convolutions) -> jax.Array:
    """See `sequence_xla.front`; reads x out of xz in place."""
    cut = cut_sequences(xz, convolutions.kernels.shape[1], gradients=False)
    return gpu.run_once(
        mosaic_sequence_front.front(xz, *_float32(convolutions), cut, interpret=gpu.interpreted())
    )


def back(xz: jax.Array, y: Pair, norm: Norm, *, eps: float, **cutting: Any) -> jax.Array:
    """See `sequence_xla.back`."""
    cut = cut_rows(xz, gradients=False, **cutting)
    return gpu.run_once(
        mosaic_sequence_back.back(xz, y, *_float32(norm), cut, eps=eps, interpret=gpu.interpreted())
    )


def back_gradients(
    xz: jax.Array, y: Pair, norm: Norm, out_bar: jax.Array, *, eps: float, **cutting: Any
):
    """See `sequence_xla.back_gradients`."""
    cut = cut_rows(xz, gradients=True, **cutting)
    y_bar, xz_bar, norm_bar = mosaic_sequence_back.back_gradients(
        xz, y, *_float32(norm), out_bar, cut, eps=eps, interpret=gpu.interpreted()
    )
    norm_bar = summed(norm_bar, norm, cut.norm_kind)
    return y_bar, xz_bar, norm_bar


def front_gradients(
    xz: jax.Array, c_bar: jax.Array, xz_bar: jax.Array, convolutions: Convolutions
) -> tuple[jax.Array, Convolutions]:
    """See `sequence_xla.front_gradients`."""
    taps = convolutions.kernels.shape[1]
    cut = cut_sequences(xz, taps, gradients=True)
    xz_bar, shares = mosaic_sequence_front.front_gradients(
        xz, c_bar, xz_bar, *_float32(convolutions), cut, interpret=gpu.interpreted()
    )
    sums = shares.sum(0)
    gradients = Convolutions(sums[:, :taps], sums[:, taps])
    return xz_bar, jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, convolutions)

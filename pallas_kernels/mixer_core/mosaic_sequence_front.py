"""Compute convolutions with SiLU of a mixer that pools nothing, and their gradients, as Mosaic GPU kernels.

As in `mosaic_front`, a thread owns a channel and walks the tokens with the window in registers, so that every token is
read once for both directions. Sequences are cut into tiles, of which the last may reach past the end. Tokens outside a
sequence are read as zeros and never written: convolutions need zeros there, and zero gradients add nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.in_place import in_place
from pallas_kernels.mixer_core.mosaic_common import (
    CHANNELS,
    convolve,
    logistic,
    read_row,
    row_layout,
    silu,
)
from pallas_kernels.mosaic import gpu_kernel, interpret_params, store


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Describe how sequences are cut.

    Attributes:
        batch: sequences.
        length: tokens of a sequence.
        width: channels.
        taps: width of the convolutions.
        segment: tokens of a tile, at least taps - 1.
        per_block: tiles that a block visits one after another.
    """

    batch: int
    length: int
    width: int
    taps: int
    segment: int
    per_block: int

    @property
    def halo(self) -> int:
        """Number of tokens before and after a tile that the convolutions read."""
        return self.taps - 1

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.length, self.segment)

    @property
    def groups(self) -> int:
        """Number of blocks along a sequence."""
        return pl.cdiv(self.tiles, self.per_block)

    @property
    def mesh(self) -> dict[str, Any]:
        """Grid of blocks of the kernel."""
        return {
            "grid": (self.width // CHANNELS, self.groups, self.batch),
            "grid_names": ("block", "group", "batch"),
        }

    def items(self) -> Any:
        """Return the number of this block's tiles: the last block of a sequence may have fewer than others."""
        return jnp.minimum(self.per_block, self.tiles - lax.axis_index("group") * self.per_block)

    def start(self, item: Any) -> Any:
        """Return the first token of this block's tile number ``item``."""
        return (lax.axis_index("group") * self.per_block + item) * self.segment

    def part(self, ref: Any, start: Any, rows: int) -> Any:
        """Slice neighbouring tokens of this block's sequence and channels out of an array ``b l ≥e``."""
        channels = pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)
        return ref.at[lax.axis_index("batch"), pl.ds(start, rows), channels]

    def fetch(self, ref: Any, tile: Any, barrier: Any, start: Any, rows: int) -> None:
        """Start to copy the tokens from ``start`` on into a tile."""
        plgpu.copy_gmem_to_smem(
            self.part(ref, start, rows), tile, barrier, oob_mode=plgpu.OOBFillMode.ZEROS
        )

    def fetch_from_before(self, ref: Any, tile: Any, barrier: Any, start: Any, rows: int) -> None:
        """Start to copy the tokens from ``start`` - halo on into a tile. Tokens outside the sequence are zeros.

        There are two copies, because a copy cannot begin before the array. The halo of the first tile is copied from
        after the end of the sequence instead, which also gives zeros.
        """
        before = lax.select(start == 0, self.length, start - self.halo)
        self.fetch(ref, tile.at[pl.ds(0, self.halo)], barrier, before, self.halo)
        rest = rows - self.halo
        self.fetch(ref, tile.at[pl.ds(self.halo, rest)], barrier, start, rest)

    def walk(self, fetch: Any, visit: Any, carry: Any) -> Any:
        """Call ``visit(item, slot, refill, carry)`` for every tile, while the next tile is being copied.

        ``fetch(start, slot)`` starts to copy a tile. ``visit`` calls ``refill`` when it no longer reads the slot.
        """
        items = self.items()
        fetch(self.start(0), 0)
        if self.per_block > 1:
            pl.when(items > 1)(lambda: fetch(self.start(1), 1))

        def turn(item, carry):
            slot = lax.rem(item, 2)
            refill = pl.when(item + 2 < items)
            return visit(
                item, slot, lambda: refill(lambda: fetch(self.start(item + 2), slot)), carry
            )

        return lax.fori_loop(0, items, turn, carry)


@functools.partial(jax.jit, static_argnames=("cut", "interpret"))
def front(xz, kernels, biases, cut: Sequences, *, interpret: bool):
    """Apply both directions' convolutions and SiLU.

    Args:
        xz: ``b l ≥e``; channels beyond e are not read.
        kernels: ``2 k e`` and biases ``2 e``, float32, forward then backward.

    Returns:
        Forward and backward tokens, ``2 b l e`` in xz's dtype.
    """
    layout = row_layout(CHANNELS)
    segment, halo = cut.segment, cut.halo

    def body(x_ref, kernels_ref, biases_ref, c_ref, x_tiles, c_tiles, barrier):
        channels = pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)
        row = lambda ref: read_row(ref, layout)  # noqa: E731

        def fetch(start, slot):
            tile = x_tiles.at[slot]
            cut.fetch_from_before(x_ref, tile, barrier.at[slot], start, segment + 2 * halo)

        def visit(item, slot, refill, _):
            plgpu.barrier_wait(barrier.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tiles have left
            window = [row(x_tiles.at[slot, j]) for j in range(2 * halo)]
            for t in range(segment):
                window.append(row(x_tiles.at[slot, t + 2 * halo]))
                for d in (0, 1):
                    c = convolve(window, kernel[d], bias[d], bool(d))
                    store(c_tiles.at[d, t], silu(c, layout, interpret, xz.dtype).astype(xz.dtype))
                window.pop(0)
            plgpu.commit_smem()
            for d in (0, 1):
                part = cut.part(c_ref.at[d], cut.start(item), segment)
                plgpu.copy_smem_to_gmem(c_tiles.at[d], part)
            refill()
            return ()

        kernel = [[row(kernels_ref.at[d, j, channels]) for j in range(cut.taps)] for d in (0, 1)]
        bias = [row(biases_ref.at[d, channels]) for d in (0, 1)]
        cut.walk(fetch, visit, ())
        plgpu.wait_smem_to_gmem(0)

    # A tile as wide as the array is copied in one piece, past the end of its sequence: make room for it.
    length = cut.tiles * segment if cut.width == CHANNELS else cut.length
    c = gpu_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2, cut.batch, length, cut.width), xz.dtype),
        scratch_types=[
            plgpu.SMEM((2, segment + 2 * halo, CHANNELS), xz.dtype),
            plgpu.SMEM((2, segment, CHANNELS), xz.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_sequence_front",
        **cut.mesh,
    )(xz, kernels, biases)
    return c[:, :, : cut.length]


@functools.partial(jax.jit, static_argnames=("cut", "interpret"))
def front_gradients(xz, c_bar, xz_bar, kernels, biases, cut: Sequences, *, interpret: bool):
    """Recompute SiLU and convolution, and carry the gradients of both directions' tokens through them to x:

        dp_d = dc_d silu'(p_d)
        dx_t = sum over taps j of  k_f[j] dp_f[t + K-1-j]  +  k_b[j] dp_b[t - (K-1-j)]

    Args:
        c_bar: gradients of both directions' tokens, ``2 b l e`` in xz's dtype.
        xz_bar: ``b l 2e``; its first half is overwritten. All other arguments are those of `front`.

    Returns:
        xz_bar, in the same buffer if nothing else needs the old values; and the gradients of kernels and biases,
        ``parts 2 (k + 1) e`` float32, to be summed over the parts.
    """
    layout = row_layout(CHANNELS)
    segment, halo, taps = cut.segment, cut.halo, cut.taps

    def body(*refs):
        x_bar_ref, x_ref, c_bar_ref, kernels_ref, biases_ref, sums_ref = refs[:6]
        x_tiles, *c_bar_tiles, x_bar_tile, barrier = refs[6:]
        batch, group = lax.axis_index("batch"), lax.axis_index("group")
        channels = pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)
        row = lambda ref: read_row(ref, layout)  # noqa: E731

        def fetch(start, slot):
            at = barrier.at[slot]
            cut.fetch_from_before(x_ref, x_tiles.at[slot], at, start, segment + 2 * halo)
            forward, backward = (tiles.at[slot] for tiles in c_bar_tiles)
            cut.fetch(c_bar_ref.at[0], forward, at, start, segment + halo)
            cut.fetch_from_before(c_bar_ref.at[1], backward, at, start, segment + halo)

        def visit(item, slot, refill, sums):
            plgpu.barrier_wait(barrier.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile has left
            sums = [list(s) for s in sums]
            # All tokens first and all gradients last, because the compiler lets no read pass a write.
            tokens = [row(x_tiles.at[slot, j]) for j in range(segment + 2 * halo)]
            bars = [
                [row(tiles.at[slot, p]) for p in range(segment + halo)] for tiles in c_bar_tiles
            ]
            x_bars = []
            back: list[list[jax.Array]] = [[], []]  # dp of the last taps places, per direction
            # At turn p the window ends at token p: p is the place of the forward convolution
            # and p - halo that of the backward one, whose windows are then the same tokens.
            for p in range(segment + halo):
                window = tokens[p : p + taps]
                for d, at in ((0, p), (1, p - halo)):
                    seen = window[::-1] if d else window
                    total = bias[d]
                    for j in range(taps):
                        total = total + kernel[d][j] * seen[j]
                    sigma = logistic(total, layout, interpret, xz.dtype)
                    slope = sigma + total * sigma * (1.0 - sigma)
                    p_bar = bars[d][p] * slope
                    if 0 <= at < segment:
                        for j in range(taps):
                            sums[d][j] = sums[d][j] + p_bar * seen[j]
                        sums[d][taps] = sums[d][taps] + p_bar
                    back[d].append(p_bar)
                if p >= halo:
                    # back[0] holds places p - halo .. p, back[1] p - 2 halo .. p - halo.
                    total = kernel[0][halo] * back[0][0] + kernel[1][halo] * back[1][halo]
                    for j in range(halo):
                        total = total + kernel[0][j] * back[0][halo - j]
                        total = total + kernel[1][j] * back[1][j]
                    x_bars.append(total.astype(xz.dtype))
                    back[0].pop(0)
                    back[1].pop(0)
            for t, x_bar in enumerate(x_bars):
                store(x_bar_tile.at[t], x_bar)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_bar_tile, cut.part(x_bar_ref, cut.start(item), segment))
            refill()
            return tuple(tuple(s) for s in sums)

        kernel = [[row(kernels_ref.at[d, j, channels]) for j in range(taps)] for d in (0, 1)]
        bias = [row(biases_ref.at[d, channels]) for d in (0, 1)]
        zero = plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), layout)
        sums = cut.walk(fetch, visit, ((zero,) * (taps + 1),) * 2)
        for d in (0, 1):
            for j in range(taps + 1):
                store(sums_ref.at[batch, group, d, j, channels], sums[d][j])
        plgpu.wait_smem_to_gmem(0)

    tile = lambda rows: plgpu.SMEM((2, rows, CHANNELS), xz.dtype)  # noqa: E731
    shares = jax.ShapeDtypeStruct((cut.batch, cut.groups, 2, taps + 1, cut.width), jnp.float32)
    run = gpu_kernel(
        body,
        out_type=shares,
        scratch_types=[
            tile(segment + 2 * halo),
            tile(segment + halo),
            tile(segment + halo),
            plgpu.SMEM((segment, CHANNELS), xz.dtype),
            plgpu.Barrier(num_arrivals=5, num_barriers=2),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_sequence_front_gradients",
        **cut.mesh,
    )

    xz_bar, sums = in_place(run, shares)(xz_bar, xz, c_bar, kernels, biases)
    return xz_bar, sums.reshape(-1, *sums.shape[2:])

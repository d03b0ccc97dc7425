"""Compute the back of a mixer that pools nothing (mean of both directions, LayerNorm, gate) as Mosaic GPU kernels.

    out = LayerNorm((y_f + y_b)/2) · silu(z)

Tokens are independent of each other, so the tokens of all sequences form one array of rows. It is cut into tiles of
rows, and each thread block walks a few of them. As in `mosaic_back`, one warp (or all four together) works on a token.
Results overwrite the inputs in the same shared-memory tiles, and are copied out from there.
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

from pallas_kernels.mixer_core.mosaic_common import (
    BLOCK,
    TokenLayouts,
    blocked,
    logistic,
    owned_blocks,
    read_row,
    row_layout,
    silu,
)
from pallas_kernels.mosaic import gpu_kernel, interpret_params, store


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows of tokens are cut: tiles of ``tile`` tokens, and ``per_block`` tiles for each thread block."""

    tokens: int
    width: int
    tile: int
    per_block: int
    padding: int = 0  # channels at the end that are zeros and count in no norm
    norm_kind: str = "layer"

    @property
    def blocks(self) -> int:
        """Number of channel blocks, of 128 channels each."""
        return self.width // BLOCK

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.tokens, self.tile)

    @property
    def groups(self) -> int:
        return pl.cdiv(self.tiles, self.per_block)

    def smem(self, dtype: Any) -> Any:
        """Allocate two tiles: the block works on one while the other is copied out and filled again."""
        return plgpu.SMEM((2, self.tile, self.blocks, BLOCK), dtype)


class Walk:
    """The walk over tiles that both kernels share: copy a tile in, visit its tokens, copy the results out."""

    def __init__(self, cut: Rows, eps: float):
        self.cut, self.eps = cut, eps
        self.layouts = TokenLayouts(cut.blocks, cut.padding, cut.norm_kind)

    def part(self, ref: Any, item: Any, half: int = 0, rows: int = 0) -> Any:
        cut = self.cut
        start = (lax.axis_index("group") * cut.per_block + item) * cut.tile
        return ref.at[pl.ds(start, rows or cut.tile), pl.ds(half * cut.blocks, cut.blocks)]

    def run(self, sources, tiles, barrier, results, visit, carry):
        """Loop ``carry = visit(tiles, rows, carry)`` over all tokens of this thread block, a few rows at a time.

        Args:
            sources: a pair (array, half) for each of ``tiles``; the tile is filled from this half of the channels.
            tiles: shared-memory tiles, from `Rows.smem`.
            barrier: barrier of the copies into the tiles, one per slot.
            results: maps the index of a tile to a pair (array, half), to which the tile is copied after the visits.
            visit: computes some rows, and writes results into the tiles in place.
            carry: initial carry.
        """
        cut = self.cut
        items = jnp.minimum(cut.per_block, cut.tiles - lax.axis_index("group") * cut.per_block)

        def fetch(item, slot):
            for (ref, half), tile in zip(sources, tiles, strict=True):
                plgpu.copy_gmem_to_smem(
                    self.part(ref, item, half),
                    tile.at[slot],
                    barrier.at[slot],
                    oob_mode=plgpu.OOBFillMode.ZEROS,
                )

        def turn(item, carry):
            slot = lax.rem(item, 2)
            plgpu.barrier_wait(barrier.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the other slot's tiles have left
            pl.when(item + 1 < items)(lambda: fetch(item + 1, 1 - slot))
            at_once = self.layouts.at_once
            held = [tile.at[slot] for tile in tiles]
            step = lambda i, carry: visit(held, pl.ds(i * at_once, at_once), carry)  # noqa: E731
            carry = lax.fori_loop(0, cut.tile // at_once, step, carry)
            plgpu.commit_smem()
            self.send(results, tiles, slot, item)
            return carry

        fetch(jnp.int32(0), 0)
        carry = lax.fori_loop(0, items, turn, carry)
        plgpu.wait_smem_to_gmem(0)
        return carry

    def send(self, results, tiles, slot, item):
        """Copy a tile to global memory in one bulk copy.

        Of a partial last tile, copy only the rows that exist, because bulk copies are not clipped at the array's end.
        """
        cut = self.cut

        def rows_of_it(rows):
            for number, (ref, half) in results.items():
                tile = tiles[number].at[slot, pl.ds(0, rows)]
                plgpu.copy_smem_to_gmem(tile, self.part(ref, item, half, rows))

        rest = cut.tokens % cut.tile
        if not rest:
            rows_of_it(cut.tile)
            return
        last = lax.axis_index("group") * cut.per_block + item == cut.tiles - 1
        pl.when(last)(lambda: rows_of_it(rest))
        pl.when(jnp.logical_not(last))(lambda: rows_of_it(cut.tile))

    def tokens(self, ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=self.layouts.tokens, optimized=False).astype(jnp.float32)

    def norm(self, *refs: Any) -> list[jax.Array]:
        """Load the LayerNorm's scale and shift, repeated over the tokens."""
        layouts = self.layouts
        return [
            layouts.over_tokens(plgpu.load(ref, layout=layouts.channels, optimized=False))
            for ref in refs
        ]

    def normalise(self, tiles: Any, rows: Any) -> tuple[jax.Array, jax.Array | None]:
        """Return the mean of both directions, normalised over the channels, and 1 / its standard deviation."""
        s = (self.tokens(tiles[0].at[rows]) + self.tokens(tiles[1].at[rows])) * 0.5
        return self.layouts.normalise(s, self.eps)


def _rows(x: jax.Array) -> jax.Array:
    """Reshape ``b l channels`` to ``tokens blocks 128``."""
    x = blocked(x)
    return x.reshape(-1, *x.shape[2:])


@functools.partial(jax.jit, static_argnames=("cut", "eps", "interpret"))
def back(xz, y, scale, shift, cut: Rows, *, eps: float, interpret: bool):
    """Average both directions, apply LayerNorm, and gate with silu(z).

    Args:
        xz: ``b l 2e``; only its second half, z, is read.
        y: outputs of both directions' scans, ``b l e`` each, in xz's dtype.
        scale, shift: parameters of the LayerNorm, ``e`` float32.
        cut: how the tokens are cut into tiles.
        eps: epsilon of the LayerNorm.
        interpret: run in Pallas' interpreter.

    Returns:
        ``b l e`` in xz's dtype.
    """
    work = Walk(cut, eps)

    def body(z_ref, first_ref, second_ref, scale_ref, shift_ref, out_ref, *scratch):
        *tiles, barrier = scratch

        def visit(tiles, rows, carry):
            gamma, beta = parameters
            s, _ = work.normalise(tiles, rows)
            z = work.tokens(tiles[2].at[rows])
            out = work.layouts.scale_and_shift(s, gamma, beta) * silu(
                z, work.layouts.tokens, interpret, xz.dtype
            )
            store(tiles[2].at[rows], out.astype(xz.dtype))
            return carry

        parameters = work.norm(scale_ref, shift_ref)
        sources = ((first_ref, 0), (second_ref, 0), (z_ref, 1))
        work.run(sources, tiles, barrier, {2: (out_ref, 0)}, visit, ())

    out = gpu_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((cut.tokens, cut.blocks, BLOCK), xz.dtype),
        scratch_types=[
            *[cut.smem(xz.dtype)] * 3,
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_sequence_back",
        grid=(cut.groups,),
        grid_names=("group",),
    )(*map(_rows, (xz, *y)), *map(blocked, (scale, shift)))
    return out.reshape(y[0].shape)


@functools.partial(jax.jit, static_argnames=("cut", "eps", "interpret"))
def back_gradients(xz, y, scale, shift, out_bar, cut: Rows, *, eps: float, interpret: bool):
    """Compute the gradients of `back`.

    Args:
        out_bar: gradient of `back`'s output, in the output's dtype. All other arguments are those of `back`.

    Returns:
        y_bar: gradient of each direction's y (equal for both), ``b l e`` in xz's dtype.
        xz_bar: gradient of xz, ``b l 2e``. Only its second half, the gradient of z, is written.
        norm_bar: gradients of scale and shift, summed per thread block only, ``2 parts e`` float32.
    """
    work = Walk(cut, eps)
    layouts = work.layouts
    owned = owned_blocks(cut.blocks)
    row = row_layout(owned, BLOCK)

    def body(*refs):
        z_ref, first_ref, second_ref, scale_ref, shift_ref, g_ref = refs[:6]
        y_bar_ref, xz_bar_ref, norm_ref, *tiles, sums_tile, barrier = refs[6:]

        def visit(tiles, rows, sums):
            gamma, beta = parameters
            s, inverse = work.normalise(tiles, rows)
            z, g = work.tokens(tiles[2].at[rows]), work.tokens(tiles[3].at[rows])
            sigma = logistic(z, layouts.tokens, interpret, xz.dtype)
            z_bar = (
                g * layouts.scale_and_shift(s, gamma, beta) * (sigma + z * sigma * (1.0 - sigma))
            )
            store(tiles[2].at[rows], z_bar.astype(xz.dtype))
            g = g * z * sigma
            sums = (sums[0] + g * s, sums[1] + g)
            y_bar = layouts.normalise_gradient(g, s, gamma, inverse) * 0.5
            store(tiles[0].at[rows], y_bar.astype(xz.dtype))
            return sums

        parameters = work.norm(scale_ref, shift_ref)
        zeros = jnp.zeros((layouts.at_once, cut.blocks, BLOCK), jnp.float32)
        zeros = plgpu.layout_cast(zeros, layouts.tokens)
        sources = ((first_ref, 0), (second_ref, 0), (z_ref, 1), (g_ref, 0))
        results = {0: (y_bar_ref, 0), 2: (xz_bar_ref, 1)}
        sums = work.run(sources, tiles, barrier, results, visit, (zeros, zeros))
        # Add up the sums over tokens that each warp has made for itself.
        for i in (0, 1):
            store(sums_tile, sums[i])
            plgpu.commit_smem()
            for start in range(0, cut.blocks, owned):
                channels = pl.ds(start, owned)
                rows = [read_row(sums_tile.at[t, channels], row) for t in range(layouts.at_once)]
                total = functools.reduce(jnp.add, rows)
                store(norm_ref.at[i, lax.axis_index("group"), channels], total)
            plgpu.commit_smem()

    y_bar, xz_bar, norm = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((cut.tokens, cut.blocks, BLOCK), xz.dtype),
            jax.ShapeDtypeStruct((cut.tokens, 2 * cut.blocks, BLOCK), xz.dtype),
            jax.ShapeDtypeStruct((2, cut.groups, cut.blocks, BLOCK), jnp.float32),
        ],
        scratch_types=[
            *[cut.smem(xz.dtype)] * 4,
            plgpu.SMEM((layouts.at_once, cut.blocks, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=4, num_barriers=2),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_sequence_back_gradients",
        grid=(cut.groups,),
        grid_names=("group",),
    )(*map(_rows, (xz, *y)), *map(blocked, (scale, shift)), _rows(out_bar))
    return (
        y_bar.reshape(out_bar.shape),
        xz_bar.reshape(xz.shape),
        norm.reshape(2, cut.groups, cut.width),
    )

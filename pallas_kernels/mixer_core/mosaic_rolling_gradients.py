"""Compute what `mosaic_front_gradients` does, for whole grids whose lines cut into equal segments.

The other kernel begins anew with every segment, and computes the gradients at the tokens around a segment once more.
Here a thread block goes on from segment to segment, since lines follow each other in scan order. Registers keep the
last tokens and gradients that the convolutions reach back to, so that every token is read and computed once.

At turn p a thread computes the forward direction's gradient dp at token p and the backward direction's at token
p - halo, both from the same window of tokens, and then dx at token p - halo. A thread block makes `halo` turns before
its first segment. After these, the turns of a segment begin `halo` tokens behind its first token and write all of its
dx.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import Grid
from pallas_kernels.mixer_core.in_place import in_place
from pallas_kernels.mixer_core.mosaic_common import CHANNELS, logistic, read_row, row_layout
from pallas_kernels.mosaic import gpu_kernel, interpret_params, store

SLOTS = 3  # segments in shared memory: two that are read and one on its way


class Pooled(NamedTuple):
    """Hold the gradients of a line's pooled tokens, of each direction, times the share of a token.

    Attributes:
        bars: one vector of channels for each direction.
        places: with "max", the tokens of the maxima; else ().
    """

    bars: tuple[jax.Array, ...]
    places: tuple[jax.Array, ...]

    def at(self, direction: int, token) -> jax.Array:
        """Return the gradient at a token of the line."""
        bar = self.bars[direction]
        return jnp.where(self.places[direction] == token, bar, 0.0) if self.places else bar


@functools.partial(jax.jit, static_argnames=("grid", "share", "interpret"))
def front_gradients(
    x, ds, dxz, pooled_bar, places, kernels, biases, D, grid: Grid, *, share: float, interpret
):
    """See `mosaic_front_gradients.front_gradients`. Segments must divide lines and be no shorter than the halo.

    A position has one token.
    """
    layout = row_layout(CHANNELS)
    halo, segment, taps = grid.halo, grid.segment, grid.taps
    items = grid.per_block  # whole lines

    def body(*refs):
        dxz_ref, x_ref, ds_ref, pooled_ref, *place_refs = refs[:-8]
        k_ref, b_ref, D_ref, sums_ref, x_tiles, ds_tiles, dx_tiles, barrier = refs[-8:]
        batch, group, block = (lax.axis_index(name) for name in ("batch", "group", "block"))
        channels = pl.ds(block * CHANNELS, CHANNELS)

        def place(item):
            line, _, start = grid.place(group, item)
            return line, start

        first, _ = place(0)

        def copy(slot, line, start, size):
            for ref, tiles in ((x_ref, x_tiles), (ds_ref, ds_tiles)):
                plgpu.copy_gmem_to_smem(
                    grid.part(ref, batch, line, start, size, channels),
                    tiles.at[slot, pl.ds(0, size)],
                    barrier.at[slot],
                    oob_mode=plgpu.OOBFillMode.ZEROS,  # Past the end of a line: see `Grid.fetch_with_halo`.
                )

        def fetch(item):
            """Fetch a segment of the thread block, or the tokens behind the last one."""
            line, start = place(item)
            slot = lax.rem(item, SLOTS)
            pl.when(item < items)(lambda: copy(slot, line, start, segment))

            @pl.when(item == items)
            def _():
                last = line == grid.lines
                start = lax.select(last, jnp.int32(grid.tokens), jnp.int32(0))
                copy(slot, lax.min(line, grid.lines - 1), start, halo)

        start = lax.select(first == 0, jnp.int32(grid.tokens), jnp.int32(grid.tokens - halo))
        copy(SLOTS - 1, lax.max(first - 1, 0), start, halo)
        fetch(jnp.int32(0))
        fetch(jnp.int32(1))

        row = lambda ref: read_row(ref, layout)  # noqa: E731
        kernel = [[row(k_ref.at[d, j, channels]) for j in range(taps)] for d in (0, 1)]
        bias = [row(b_ref.at[d, channels]) for d in (0, 1)]
        skip = [row(D_ref.at[d, channels]) * 0.5 for d in (0, 1)]

        def pooled_of(line):
            """Return the gradients of a line's pooled tokens, zero for a line outside the grid."""
            inside = jnp.logical_and(line >= 0, line < grid.lines)
            factor = lax.select(inside, jnp.float32(share), jnp.float32(0.0))
            at_line = (batch, jnp.clip(line, 0, grid.lines - 1), channels)
            load = lambda ref: plgpu.load(ref, layout=layout)  # noqa: E731
            bars = tuple(load(pooled_ref.at[d, *at_line]) * factor for d in (0, 1))
            return Pooled(bars, tuple(load(ref.at[*at_line]) for ref in place_refs))

        def gradient(d, window, g, pooled_bar):
            """Return dp, and c of the skip, at the token of a window."""
            total = bias[d]
            for j in range(taps):
                total = total + kernel[d][j] * window[taps - 1 - j if d else j]
            sigma = logistic(total, layout, interpret, x.dtype)
            c_bar = skip[d] * g + pooled_bar
            c = total * sigma
            return c_bar * (sigma + c * (1.0 - sigma)), c

        def add(sums, d, window, p_bar, skipped):
            for j in range(taps):
                sums[d][j] = sums[d][j] + p_bar * window[taps - 1 - j if d else j]
            sums[d][taps] = sums[d][taps] + p_bar
            sums[d][taps + 1] = sums[d][taps + 1] + skipped

        def read(slot, at):
            return row(x_tiles.at[slot, at]), row(ds_tiles.at[slot, at])

        def prologue():
            """Make the turns before the first segment, which write nothing."""
            plgpu.barrier_wait(barrier.at[SLOTS - 1])
            plgpu.barrier_wait(barrier.at[0])
            edge = [read(SLOTS - 1, j) for j in range(halo)]
            window, g = (list(values) for values in zip(*edge, strict=True))
            sums = [[zero] * (taps + 2) for _ in (0, 1)]
            back: list[list[jax.Array]] = [[], []]
            before, here = pooled_of(first - 1), pooled_of(first)
            for p in range(halo):
                for values, new in zip((window, g), read(0, p), strict=True):
                    values.append(new)
                p_bar, c = gradient(0, window, g[-1], here.at(0, p))
                add(sums, 0, window, p_bar, c * g[-1])
                back[0].append(p_bar)
                token = grid.tokens - halo + p
                p_bar, _ = gradient(1, window, g[0], before.at(1, token))
                back[1].append(p_bar)
                window.pop(0)
                g.pop(0)
            plgpu.commit_smem()
            fetch(jnp.int32(2))
            return window, g, back, here, sums

        def item_of(item, state):
            window, g, back, here, sums = jax.tree.map(lambda x: x, state)  # lists of its own
            line, start = place(item)
            next_line, next_start = place(item + 1)
            behind = pooled_of(next_line)
            slot, next_slot = lax.rem(item, SLOTS), lax.rem(item + 1, SLOTS)
            dx_tile = dx_tiles.at[lax.rem(item, 2)]
            plgpu.barrier_wait(barrier.at[next_slot])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # The tile before the last has left.
            # Read all tokens first and write all gradients last, because the compiler lets no read pass a write. So one
            # token's work hides the waits of the next one, in fewer registers, too.
            places = range(halo, segment + halo)
            entering = [
                read(slot, at) if at < segment else read(next_slot, at - segment) for at in places
            ]
            written = []
            for k, (at, new) in enumerate(zip(places, entering, strict=True)):
                window.append(new[0])
                g.append(new[1])
                if at < segment:
                    p_bar, c = gradient(0, window, g[-1], here.at(0, start + at))
                    add(sums, 0, window, p_bar, c * g[-1])
                else:
                    token = next_start + at - segment
                    p_bar, c = gradient(0, window, g[-1], behind.at(0, token))
                    counts = item + 1 < items  # Another thread block counts the tokens behind.
                    only = lambda value: jnp.where(counts, value, 0.0)  # noqa: B023, E731
                    add(sums, 0, window, only(p_bar), only(c * g[-1]))
                back[0].append(p_bar)
                p_bar, c = gradient(1, window, g[0], here.at(1, start + k))
                add(sums, 1, window, p_bar, c * g[0])
                back[1].append(p_bar)
                # Both lists hold `taps` places: back[0] those up to token k + halo, back[1] those up to token k.
                total = kernel[0][taps - 1] * back[0][0]
                for j in range(taps - 1):
                    total = total + kernel[0][j] * back[0][taps - 1 - j]
                for j in range(taps):
                    total = total + kernel[1][j] * back[1][j]
                written.append(total.astype(x.dtype))
                for values in (window, g, *back):
                    values.pop(0)
            for k, value in enumerate(written):
                store(dx_tile.at[k], value)
            plgpu.commit_smem()
            part = grid.part(dxz_ref, batch, line, start, segment, channels)
            plgpu.copy_smem_to_gmem(dx_tile, part)
            fetch(item + SLOTS)
            return window, g, back, behind, sums

        zero = plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), layout)
        *_, sums = lax.fori_loop(0, items, item_of, prologue())
        for d in (0, 1):
            for j in range(taps + 2):
                factor = 0.5 if j == taps + 1 else 1.0
                store(sums_ref.at[batch, group, d, j, channels], sums[d][j] * factor)
        plgpu.wait_smem_to_gmem(0)

    shares = jax.ShapeDtypeStruct((grid.batch, grid.groups, 2, taps + 2, grid.width), jnp.float32)
    run = gpu_kernel(
        body,
        out_type=shares,
        scratch_types=[
            plgpu.SMEM((SLOTS, segment, CHANNELS), x.dtype),
            plgpu.SMEM((SLOTS, segment, CHANNELS), ds.dtype),
            plgpu.SMEM((2, segment, CHANNELS), x.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_front_gradients",
        grid=(grid.width // CHANNELS, grid.groups, grid.batch),
        grid_names=("block", "group", "batch"),
    )
    dxz, sums = in_place(run, shares)(dxz, x, ds, pooled_bar, *places, kernels, biases, D)
    return dxz, sums.reshape(-1, *sums.shape[2:])

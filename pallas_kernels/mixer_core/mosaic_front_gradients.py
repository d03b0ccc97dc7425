"""Compute the gradients of `mosaic_front` in one Mosaic GPU kernel: the last part of a mixer core's backward pass.

The kernel takes the gradients of s, the mean of both directions' outputs, and of the pooled tokens. It recomputes the
convolutions and goes back through skip, pooling, SiLU and convolutions to x:

    dc_d   = D_d ds / 2 + dpooled_d of the line / tokens        dp_d = dc_d silu'(p_d)
             (with "max": dpooled_d of the line goes to the token of the maximum alone)
    dx_t   = sum over taps j of  k_f[j] dp_f[t + K-1-j]  +  k_b[j] dp_b[t - (K-1-j)]

As in the forward kernel, each thread owns one channel and visits the tokens of its lines in order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import Grid
from pallas_kernels.mixer_core.in_place import in_place
from pallas_kernels.mixer_core.mosaic_common import CHANNELS, logistic, read_row, row_layout
from pallas_kernels.mosaic import gpu_kernel, interpret_params, store


@functools.partial(jax.jit, static_argnames=("grid", "share", "interpret"))
def front_gradients(
    x, ds, dxz, pooled_bar, places, ids, kernels, biases, D, grid: Grid, *, share: float, interpret
):
    """Write the gradient of x into `dxz`, and compute the gradients of the convolutions and of D.

    Args:
        x: ``b rows (columns per_position) ≥e``; channels beyond e are not read.
        ds: gradient of s, ``b rows (columns per_position) e``.
        dxz: ``b rows (columns per_position) 2e``; its first half is overwritten.
        pooled_bar: gradient of the pooled tokens, ``2 b steps e`` float32.
        places: with "max", each direction's tokens of the maxima in their lines, ``b steps e`` int32; else ().
        ids: for a ragged grid, each direction's line of ``pooled_bar`` for every token, ``b tokens`` int32; ``grid`` is
            then any grid that holds the tokens. Else ().
        kernels: ``2 k e`` float32.
        biases: ``2 e`` float32.
        D: ``2 e`` float32.
        grid: how the grid of tokens is divided.
        share: factor of a token in the sum of its step; 1 with "max".
        interpret: run on the CPU, by Pallas' interpreter.

    Returns:
        dxz, in the same buffer if nothing else needs the old values; and the gradients of kernels, biases and D,
        ``parts 2 (k + 2) e`` float32, to be summed over the parts.
    """
    layout = row_layout(CHANNELS)
    halo, segment, taps, per_position = grid.halo, grid.segment, grid.taps, grid.per_position
    rows = segment + 2 * halo
    items = grid.per_block

    def body(*refs):
        dxz_ref, x_ref, ds_ref, pooled_ref, *index_refs = refs[:-8]
        k_ref, b_ref, D_ref, sums_ref, x_tiles, ds_tiles, dx_tile, barrier = refs[-8:]
        batch, group, block = (lax.axis_index(name) for name in ("batch", "group", "block"))
        channels = pl.ds(block * CHANNELS, CHANNELS)

        def fetch(item, slot):
            line, _, start = grid.place(group, item)
            for ref, tiles in ((x_ref, x_tiles), (ds_ref, ds_tiles)):
                grid.fetch_with_halo(
                    ref, tiles.at[slot], barrier.at[slot], batch, line, start, channels
                )

        for slot in range(min(2, items)):
            fetch(jnp.int32(slot), slot)
        row = lambda ref: read_row(ref, layout)  # noqa: E731
        kernel = [[row(k_ref.at[d, j, channels]) for j in range(taps)] for d in (0, 1)]
        bias = [row(b_ref.at[d, channels]) for d in (0, 1)]
        skip = [row(D_ref.at[d, channels]) * 0.5 for d in (0, 1)]

        def pooled_of(line, first_token):
            """Return a function of direction d and offset ``at``: the pooling's gradient at token ``first_token + at``.

            It is zero for a line outside the grid.
            """
            inside = jnp.logical_and(line >= 0, line < grid.lines)
            factor = lax.select(inside, jnp.float32(share), jnp.float32(0.0))
            step = jnp.clip(line, 0, grid.lines - 1) * per_position
            load = lambda ref: plgpu.load(ref, layout=layout)  # noqa: E731

            at_step = lambda k: (batch, step + k, channels)  # noqa: E731
            bars = [
                [load(pooled_ref.at[d, *at_step(k)]) * factor for k in range(per_position)]
                for d in (0, 1)
            ]
            if not places:
                return lambda d, at: bars[d][at % per_position]
            chosen = [
                [load(ref.at[*at_step(k)]) - first_token for k in range(per_position)]
                for ref in index_refs
            ]
            return lambda d, at: jnp.where(
                chosen[d][at % per_position] == at, bars[d][at % per_position], 0.0
            )

        def of_token(line, start):
            """Return the same function for a ragged grid: ``at`` counts from the start of a segment."""

            def of(d, at):
                token = line * grid.tokens + start + at
                inside = jnp.logical_and(token >= 0, token < grid.lines * grid.tokens)
                token = jnp.clip(token, 0, grid.lines * grid.tokens - 1)
                bar = row(pooled_ref.at[d, batch, index_refs[d][batch, token], channels])
                return bar * lax.select(inside, jnp.float32(share), jnp.float32(0.0))

            return of

        def pooled_around(line, start):
            """Return these functions for the tokens before, in and after a segment."""
            if ids:
                return (of_token(line, start),) * 3
            opens, closes = start == 0, start + segment == grid.tokens
            before = pooled_of(
                lax.select(opens, line - 1, line), lax.select(opens, grid.tokens, start)
            )
            after = pooled_of(
                lax.select(closes, line + 1, line), lax.select(closes, -segment, start)
            )
            return before, pooled_of(line, start), after

        def item_of(item, sums):
            line, part, start = grid.place(group, item)
            slot = lax.rem(item, 2)
            before, here, after = pooled_around(line, start)
            plgpu.barrier_wait(barrier.at[slot])
            plgpu.wait_smem_to_gmem(
                0, wait_read_only=not grid.overlaps
            )  # The previous tile has been read.
            sums = [list(s) for s in sums]
            # All tokens first and all gradients last, because the compiler lets no read pass a write.
            tokens = [row(x_tiles.at[slot, j]) for j in range(rows)]
            bars = [row(ds_tiles.at[slot, j]) for j in range(rows)]
            written = []
            back: list[list[jax.Array]] = [[], []]  # dp of the last taps places, per direction
            place_of = lambda p: before if p < 0 else here if p < segment else after  # noqa: E731
            # At turn p the window ends at token p. The forward convolution at token p and the backward one at token
            # p - halo read the same window.
            for p in range(segment + halo):
                window = tokens[p : p + taps]
                for d, at in ((0, p), (1, p - halo)):
                    total = bias[d]
                    for j in range(taps):
                        total = total + kernel[d][j] * window[taps - 1 - j if d else j]
                    sigma = logistic(total, layout, interpret, x.dtype)
                    g = bars[at + halo]
                    c_bar = skip[d] * g + place_of(at)(d, at)
                    c = total * sigma
                    p_bar = c_bar * (sigma + c * (1.0 - sigma))
                    if 0 <= at < segment:
                        added = p_bar
                        if grid.overlaps:
                            counts = grid.counts(part, at)
                            added = jnp.where(counts, p_bar, 0.0)
                            g = jnp.where(counts, g, 0.0)
                        for j in range(taps):
                            sums[d][j] = sums[d][j] + added * window[taps - 1 - j if d else j]
                        sums[d][taps] = sums[d][taps] + added
                        sums[d][taps + 1] = sums[d][taps + 1] + c * g
                    back[d].append(p_bar)
                if p >= halo:
                    # back[0] holds places p - halo .. p, back[1] p - 2 halo .. p - halo.
                    total = kernel[0][taps - 1] * back[0][0]
                    for j in range(taps - 1):
                        total = total + kernel[0][j] * back[0][taps - 1 - j]
                    for j in range(taps):
                        total = total + kernel[1][j] * back[1][j]
                    written.append(total.astype(x.dtype))
                    back[0].pop(0)
                    back[1].pop(0)
            for t, value in enumerate(written):
                store(dx_tile.at[t], value)
            plgpu.commit_smem()
            for at, size in grid.pieces:
                piece = grid.part(dxz_ref, batch, line, start + at, size, channels)
                plgpu.copy_smem_to_gmem(dx_tile.at[pl.ds(at, size)], piece)

            @pl.when(item + 2 < items)
            def _():
                fetch(item + 2, slot)

            return tuple(tuple(s) for s in sums)

        zero = plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), layout)
        sums = lax.fori_loop(0, items, item_of, (((zero,) * (taps + 2)),) * 2)
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
            plgpu.SMEM((2, rows, CHANNELS), x.dtype),
            plgpu.SMEM((2, rows, CHANNELS), ds.dtype),
            plgpu.SMEM((segment, CHANNELS), x.dtype),
            plgpu.Barrier(num_arrivals=2 * grid.copies, num_barriers=2),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_front_gradients",
        grid=(grid.width // CHANNELS, grid.groups, grid.batch),
        grid_names=("block", "group", "batch"),
    )
    dxz, sums = in_place(run, shares)(dxz, x, ds, pooled_bar, *places, *ids, kernels, biases, D)
    return dxz, sums.reshape(-1, *sums.shape[2:])

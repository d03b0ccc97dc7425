"""Compute convolutions, SiLU, row sums and skips of a ragged grid as one Mosaic GPU kernel.

As in `mosaic_front`, a thread owns a channel and walks the tokens. When the next token is in another row, it writes the
sum of the row that ends. The directions have rows of their own. If there are few samples, each is cut into runs of
tokens, and every run has sums of its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import Grid
from pallas_kernels.mixer_core.mosaic_common import CHANNELS, Convolutions, read_row, row_layout
from pallas_kernels.mosaic import gpu_kernel, interpret_params, store


@functools.partial(jax.jit, static_argnames=("grid", "rows", "share", "interpret"))
def front(x, ids, kernels, biases, D, grid: Grid, *, rows: int, share: float, interpret: bool):
    """Compute the row sums of both directions and the mean of their skips.

    Args:
        x: ``b lines tokens ≥e``, the tokens on any grid that holds them; channels beyond e are not read.
        ids: row of each token for the forward and the backward direction, ``b tokens`` int32, never decreasing.
        kernels: ``2 k e``, biases and D ``2 e``, float32, forward then backward.
        grid: how the tokens are cut.
        rows: rows of the ragged grid.
        share: factor of the sums.
        interpret: run in Pallas' interpreter.

    Returns:
        Row sums ``2 b rows e`` float32, zero for rows without tokens; and the skips, ``b lines tokens e`` in x's dtype.
    """
    layout = row_layout(CHANNELS)
    items, length = grid.per_block, grid.lines * grid.tokens

    def body(x_ref, *refs):
        *ids_refs, kernels_ref, biases_ref, D_ref, u_ref, skip_ref, tiles, skip_tiles, barrier = (
            refs
        )
        batch, group = lax.axis_index("batch"), lax.axis_index("group")
        channels = pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)

        def fetch(item, slot):
            line, _, start = grid.place(group, item)
            grid.fetch_with_halo(
                x_ref, tiles.at[slot], barrier.at[slot], batch, line, start, channels
            )

        for slot in range(min(2, items)):
            fetch(jnp.int32(slot), slot)
        row = lambda ref: read_row(ref, layout)  # noqa: E731
        convolutions = Convolutions(kernels_ref, biases_ref, D_ref, channels, x.dtype, interpret)
        zero = plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), layout)

        def clear(index, _):
            for d in (0, 1):
                store(u_ref.at[d, batch, group, index, channels], zero)
            return ()

        lax.fori_loop(0, rows, clear, ())

        def item_of(item, sums):
            slot = lax.rem(item, 2)
            line, part, start = grid.place(group, item)
            first = line * grid.tokens + start
            at = [jnp.minimum(first + t, length - 1) for t in range(grid.segment + 1)]
            rows_of = [[ref[batch, token] for token in at] for ref in ids_refs]
            plgpu.barrier_wait(barrier.at[slot])
            grid.wait_for_tile()
            window = [row(tiles.at[slot, j]) for j in range(2 * grid.halo)]
            sums = list(sums)
            for t in range(grid.segment):
                window.append(row(tiles.at[slot, t + 2 * grid.halo]))
                both = convolutions.of(window)
                store(skip_tiles.at[slot, t], convolutions.skip(both))
                for d, c in enumerate(both):
                    here = rows_of[d][t]
                    ends = here != rows_of[d][t + 1]
                    if t == grid.segment - 1:
                        ends = jnp.logical_or(ends, item == items - 1)
                    if grid.overlaps:
                        c = jnp.where(grid.counts(part, t), c, 0.0)
                        ends = jnp.logical_and(ends, grid.counts(part, t))
                    sums[d] = sums[d] + c

                    @pl.when(ends)
                    def _(d=d, here=here, total=sums[d] * share):
                        store(u_ref.at[d, batch, group, here, channels], total)

                    sums[d] = jnp.where(ends, 0.0, sums[d])
                window.pop(0)
            plgpu.commit_smem()
            grid.send(skip_tiles.at[slot], skip_ref, batch, line, start, channels)

            @pl.when(item + 2 < items)
            def _():
                fetch(item + 2, slot)

            return tuple(sums)

        lax.fori_loop(0, items, item_of, (zero, zero))
        plgpu.wait_smem_to_gmem(0)

    u, skips = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((2, grid.batch, grid.groups, rows, grid.width), jnp.float32),
            jax.ShapeDtypeStruct((*x.shape[:3], grid.width), x.dtype),
        ],
        scratch_types=[
            plgpu.SMEM((2, grid.segment + 2 * grid.halo, CHANNELS), x.dtype),
            plgpu.SMEM((2, grid.segment, CHANNELS), x.dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_ragged_front",
        grid=(grid.width // CHANNELS, grid.groups, grid.batch),
        grid_names=("block", "group", "batch"),
    )(x, *ids, kernels, biases, D)
    return u.sum(2) if grid.groups > 1 else u[:, :, 0], skips

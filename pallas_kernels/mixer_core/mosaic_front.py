"""Front of the mixer: both causal convolutions with SiLU and the pooling, as one Mosaic GPU kernel.

A thread owns a channel and walks the tokens of its lines with the convolutions' window in
registers, so that every token is read once for both directions.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import Grid
from pallas_kernels.mixer_core.mosaic_common import CHANNELS, convolve, read_row, row_layout, silu
from pallas_kernels.mosaic import compiler_params, interpret_params, store


@functools.partial(jax.jit, static_argnames=("grid", "method", "scale", "interpret"))
def front(x, kernels, biases, grid: Grid, *, method: str, scale: float, interpret: bool):
    """Pooled tokens of both directions.

    Args:
        x: ``b rows columns ≥e``; channels beyond e are not read.
        kernels: ``2 k e`` and biases ``2 e``, float32, forward then backward.
        method: "mean" (times ``scale``) or "max".

    Returns:
        Forward and backward, ``2 b lines e`` float32 (one array, as the projections of both
        take it); with "max" then, ``b lines e`` int32 each, the maxima's first places in
        their lines (any place of a line with a NaN).
    """
    largest = method == "max"
    layout = row_layout(CHANNELS)
    rows = grid.segment + 2 * grid.halo

    def body(x_ref, kernels_ref, biases_ref, *refs):
        pooled_ref, *place_refs, tiles, barrier = refs
        batch, group, block = (lax.axis_index(name) for name in ("batch", "group", "block"))
        columns = pl.ds(block * CHANNELS, CHANNELS)
        first = group * grid.per_block
        items = grid.per_block * grid.segments

        def fetch(item, slot):
            line = first + lax.div(item, grid.segments)
            start = lax.rem(item, grid.segments) * grid.segment
            grid.fetch_with_halo(
                x_ref, tiles.at[slot], barrier.at[slot], batch, line, start, columns
            )

        for slot in range(min(2, items)):
            fetch(jnp.int32(slot), slot)
        kernel = [
            [read_row(kernels_ref.at[d, j, columns], layout) for j in range(grid.taps)]
            for d in range(2)
        ]
        bias = [read_row(biases_ref.at[d, columns], layout) for d in range(2)]

        def line_of(index, _):
            def segment(part, carry):
                item = index * grid.segments + part
                slot = lax.rem(item, 2)
                plgpu.barrier_wait(barrier.at[slot])
                window = [read_row(tiles.at[slot, j], layout) for j in range(2 * grid.halo)]
                pooled, places = map(list, carry)
                for t in range(grid.segment):
                    window.append(read_row(tiles.at[slot, t + 2 * grid.halo], layout))
                    for d in range(2):
                        c = convolve(window, kernel[d], bias[d], bool(d))
                        c = silu(c, layout, interpret, x.dtype)
                        if not largest:
                            pooled[d] = pooled[d] + c
                            continue
                        best = lax.max(pooled[d], c)  # NaN if either is
                        place = (part * grid.segment + t).astype(jnp.uint32)
                        places[d] = jnp.where(best != pooled[d], place, places[d])
                        pooled[d] = best
                    window.pop(0)
                plgpu.commit_smem()

                @pl.when(item + 2 < items)
                def _():
                    fetch(item + 2, slot)

                return tuple(pooled), tuple(places)

            def full(value):
                return plgpu.layout_cast(jnp.broadcast_to(value, (CHANNELS,)), layout)

            start = full(jnp.float32(-jnp.inf if largest else 0.0))
            place = full(jnp.uint32(0))  # unsigned, as all that select gives is here
            start = (start, start), (place, place) if largest else ()
            pooled, places = lax.fori_loop(0, grid.segments, segment, start)
            if not largest:
                pooled = [side * (scale / grid.tokens) for side in pooled]
            places = [side.astype(jnp.int32) for side in places]
            for d in range(2):
                store(pooled_ref.at[d, batch, first + index, columns], pooled[d])
            for value, ref in zip(places, place_refs, strict=True):
                store(ref.at[batch, first + index, columns], value)
            return ()

        lax.fori_loop(0, grid.per_block, line_of, ())

    shape = (grid.batch, grid.lines, grid.width)
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((2, *shape), jnp.float32),
            *[jax.ShapeDtypeStruct(shape, jnp.int32)] * 2 * largest,
        ],
        scratch_types=[
            plgpu.SMEM((2, rows, CHANNELS), x.dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
        ],
        compiler_params=compiler_params(),
        interpret=interpret_params(interpret),
        kernel_name="mixer_front",
        grid=(grid.width // CHANNELS, grid.groups, grid.batch),
        grid_names=("block", "group", "batch"),
    )(x, kernels, biases)

"""Run both causal convolutions, SiLU and the pooling in one Mosaic GPU kernel: the part of a mixer before the scan.

Each thread owns one channel and visits the tokens of its lines in order. It keeps the window of both convolutions in
registers, so that every token is read from memory once for both directions.
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
    """Compute the pooled tokens of both directions.

    Args:
        x: ``b rows columns ≥e``; channels beyond e are not read.
        kernels: ``2 k e`` float32: taps of the forward convolution, then of the backward one.
        biases: ``2 e`` float32.
        grid: how the grid of tokens is divided.
        method: "mean" or "max".
        scale: factor of the mean.
        interpret: run on the CPU, by Pallas' interpreter.

    Returns:
        A list. First the pooled tokens, ``2 b lines e`` float32: forward and backward in one array, because the
        projections of both directions read one. With "max", two arrays ``b lines e`` int32 follow: for each direction,
        the position in its line of the first token that attains the maximum (any position if the line has a NaN).
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
            start = grid.start(lax.rem(item, grid.segments))
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
                        if grid.overlaps:
                            c = jnp.where(grid.counts(part, t), c, -jnp.inf if largest else 0.0)
                        if not largest:
                            pooled[d] = pooled[d] + c
                            continue
                        best = lax.max(pooled[d], c)  # NaN if either operand is NaN.
                        place = (grid.start(part) + t).astype(jnp.uint32)
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
            # Unsigned, because Mosaic's select returns unsigned integers.
            place = full(jnp.uint32(0))
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

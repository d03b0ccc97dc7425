"""Run both causal convolutions, SiLU, the pooling and the skips in one Mosaic GPU kernel: the mixer before the scan.

Each thread owns one channel and visits the tokens of its lines in order. It keeps the window of both convolutions in
registers, so that every token is read from memory once for both directions. What the skips add to each token behind
the scan is written here, because the convolutions would have to be computed again there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import Grid
from pallas_kernels.mixer_core.mosaic_common import CHANNELS, Convolutions, read_row, row_layout
from pallas_kernels.mosaic import gpu_kernel, interpret_params, store


@functools.partial(
    jax.jit, static_argnames=("grid", "method", "scale", "pooled_dtype", "interpret")
)
def front(
    x, kernels, biases, D, grid: Grid,
    *, method: str, scale: float, pooled_dtype: Any = jnp.float32, interpret: bool,
):  # fmt: skip
    """Compute the pooled tokens of both directions and the mean of their skips.

    Args:
        x: ``b rows (columns per_position) ≥e``; channels beyond e are not read.
        kernels: ``2 k e`` float32: taps of the forward convolution, then of the backward one.
        biases, D: ``2 e`` float32.
        grid: how the grid of tokens is divided.
        method: "mean" or "max".
        scale: factor of the mean.
        pooled_dtype: of the pooled tokens.
        interpret: run on the CPU, by Pallas' interpreter.

    Returns:
        A list. First the pooled tokens, ``2 b steps e`` in `pooled_dtype`: forward and backward in one array, because
        the projections of both directions read one. Then the mean of both skips,
        ``b rows (columns per_position) e`` in x's dtype. With "max", two arrays ``b steps e`` int32 follow: for each
        direction, the index in its line of the first token that attains the maximum (any token pooled with it if one
        is a NaN).
    """
    per_position = grid.per_position
    largest = method == "max"
    layout = row_layout(CHANNELS)
    rows = grid.segment + 2 * grid.halo

    def body(x_ref, kernels_ref, biases_ref, D_ref, *refs):
        pooled_ref, skip_ref, *place_refs, tiles, skip_tiles, barrier = refs
        batch, group, block = (lax.axis_index(name) for name in ("batch", "group", "block"))
        columns = pl.ds(block * CHANNELS, CHANNELS)
        items, lines = grid.per_block, grid.per_block // grid.segments
        first = group * lines

        def fetch(item, slot):
            line, _, start = grid.place(group, item)
            grid.fetch_with_halo(
                x_ref, tiles.at[slot], barrier.at[slot], batch, line, start, columns
            )

        for slot in range(min(2, items)):
            fetch(jnp.int32(slot), slot)
        convolutions = Convolutions(kernels_ref, biases_ref, D_ref, columns, x.dtype, interpret)

        def line_of(index, _):
            def segment(part, carry):
                item = index * grid.segments + part
                slot = lax.rem(item, 2)
                plgpu.barrier_wait(barrier.at[slot])
                grid.wait_for_tile()
                # All tokens first and all skips last, because the compiler lets no read pass a write.
                tokens = [read_row(tiles.at[slot, j], layout) for j in range(rows)]
                skips = []
                pooled, places = ([list(side) for side in sides] for sides in carry)
                for t in range(grid.segment):
                    k = t % per_position
                    both = convolutions.of(tokens[t : t + 2 * grid.halo + 1])
                    skips.append(convolutions.skip(both))
                    for d, c in enumerate(both):
                        if grid.overlaps:
                            c = jnp.where(grid.counts(part, t), c, -jnp.inf if largest else 0.0)
                        if not largest:
                            pooled[d][k] = pooled[d][k] + c
                            continue
                        best = lax.max(pooled[d][k], c)  # NaN if either operand is NaN.
                        place = (grid.start(part) + t).astype(jnp.uint32)
                        places[d][k] = jnp.where(best != pooled[d][k], place, places[d][k])
                        pooled[d][k] = best
                for t, skip in enumerate(skips):
                    store(skip_tiles.at[slot, t], skip)
                plgpu.commit_smem()
                line, _, start = grid.place(group, item)
                grid.send(skip_tiles.at[slot], skip_ref, batch, line, start, columns)

                @pl.when(item + 2 < items)
                def _():
                    fetch(item + 2, slot)

                return tuple(map(tuple, pooled)), tuple(map(tuple, places))

            def full(value):
                return plgpu.layout_cast(jnp.broadcast_to(value, (CHANNELS,)), layout)

            start = full(jnp.float32(-jnp.inf if largest else 0.0))
            starts = ((start,) * per_position,) * 2
            # Unsigned, because Mosaic's select returns unsigned integers. Any token of its own for each step.
            places = (
                (tuple(full(jnp.uint32(k)) for k in range(per_position)),) * 2 if largest else ()
            )
            pooled, places = lax.fori_loop(0, grid.segments, segment, (starts, places))
            factor = 1.0 if largest else scale / grid.positions
            for k in range(per_position):
                step = (first + index) * per_position + k
                for d in range(2):
                    value = pooled[d][k] if largest else pooled[d][k] * factor
                    store(pooled_ref.at[d, batch, step, columns], value.astype(pooled_dtype))
                for side, ref in zip(places, place_refs, strict=True):
                    store(ref.at[batch, step, columns], side[k].astype(jnp.int32))
            return ()

        lax.fori_loop(0, lines, line_of, ())
        plgpu.wait_smem_to_gmem(0)

    shape = (grid.batch, grid.steps, grid.width)
    return gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((2, *shape), pooled_dtype),
            jax.ShapeDtypeStruct((*x.shape[:3], grid.width), x.dtype),
            *[jax.ShapeDtypeStruct(shape, jnp.int32)] * 2 * largest,
        ],
        scratch_types=[
            plgpu.SMEM((2, rows, CHANNELS), x.dtype),
            plgpu.SMEM((2, grid.segment, CHANNELS), x.dtype),
            plgpu.Barrier(num_arrivals=grid.copies, num_barriers=2),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_front",
        grid=(grid.width // CHANNELS, grid.groups, grid.batch),
        grid_names=("block", "group", "batch"),
    )(x, kernels, biases, D)

"""Sum the cells of each box into its bins as one Mosaic GPU kernel.

    out[i, p, q] = sum over y, x of rows[i, p, y] · columns[i, q, x] · table[first[i] + y · stride[i] + x]

A thread block computes the bins of a box that lie beside each other, one after the other. It visits the cells of
a bin row by row, four neighbours at a time, one for each warp; a lane owns four channels of each 128. At the end of a
bin the warps' sums meet in shared memory. So a cell is read from the L2 cache as often as bins touch it, and nothing
that a box gathers is written to memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.mosaic_back_project import Layouts, spread
from pallas_kernels.mixer_core.mosaic_common import BLOCK, row_layout
from pallas_kernels.mosaic import WARPS, gpu_kernel, interpret_params, store

WIDEST = 1024  # channels
TOGETHER = 2  # rows of a bin whose cells are read at the same time


def unsupported(channels: int, dtype: Any) -> str | None:
    """Return why the kernel does not take maps of such channels, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"maps of {jnp.dtype(dtype).name}"
    if channels % BLOCK or channels > WIDEST:
        return f"{channels} channels: they must be a multiple of {BLOCK}, and at most {WIDEST}"
    return None


@functools.partial(jax.jit, static_argnames="interpret")
def sum_cells(table, first, stride, rows, columns, row_range, column_range, *, interpret):
    """Sum the cells of each box into its bins.

    Args:
        table: cells of all maps of each image, ``b m c``.
        first: the cell of the image that row 0 and column 0 of a box name, ``b n`` int32.
        stride: cells of a row of the box's map, ``b n`` int32.
        rows: weights ``b n p y`` float32.
        columns: weights ``b n q x`` float32.
        row_range: first row of each bin, and the one behind its last, ``b n p`` int32; weights outside are 0.
        column_range: the same of the columns, ``b n q`` int32.
        interpret: run in Pallas' interpreter.

    Returns:
        Sums ``b n p q c`` in the dtype of the table.
    """
    (b, n, p, _), q = rows.shape, columns.shape[2]
    parts, layouts = table.shape[-1] // BLOCK, Layouts()
    of_sums = row_layout(BLOCK)
    # What is read beside a bin's own cells has weight 0. It is not of the next image, whose cells may be NaN.
    table = jnp.pad(table, ((0, 0), (0, WARPS - 1), (0, 0)))
    first += jnp.arange(b, dtype=jnp.int32)[:, None] * table.shape[1]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, TOGETHER - 1)))
    columns = jnp.pad(columns, ((0, 0), (0, 0), (0, 0), (0, WARPS)))
    counts = -(-(column_range[1] - column_range[0]) // WARPS)
    numbers = (first[..., None], stride[..., None], *row_range, column_range[0], counts)
    tops, bottoms, lefts, rounds = (2 + at for at in (0, p, 2 * p, 2 * p + q))

    def body(table_ref, numbers_ref, rows_ref, columns_ref, out_ref, sums_ref):
        at = lax.axis_index("line_of_box")  # one axis: the others hold at most 65,535 thread blocks
        box, line = at // p, at % p
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
        number = lambda at: numbers_ref[box, at]  # noqa: E731
        first, stride, top = number(0), number(1), number(tops + line)
        bottom = number(bottoms + line)
        steps = (bottom - top + TOGETHER - 1) // TOGETHER
        zero = plgpu.layout_cast(jnp.zeros((WARPS, BLOCK), jnp.float32), layouts.tokens)

        def visit(j, left, step, k, total):
            """Add four columns of `TOGETHER` rows."""
            x, lines = left + k * WARPS, [top + step * TOGETHER + r for r in range(TOGETHER)]
            across = load(columns_ref.at[box, j, pl.ds(x, WARPS)], layouts.of_tokens)
            starts = [first + jnp.minimum(y, bottom - 1) * stride + x for y in lines]
            cells = [
                [load(table_ref.at[pl.ds(i, WARPS), c], layouts.tokens) for c in range(parts)]
                for i in starts
            ]
            for y, row in zip(lines, cells, strict=True):
                weight = spread(across * rows_ref[box, line, y], (WARPS, BLOCK), 0, layouts.tokens)
                total = [
                    sum_ + cell.astype(jnp.float32) * weight
                    for sum_, cell in zip(total, row, strict=True)
                ]
            return tuple(total)

        for j in range(q):
            left, count = number(lefts + j), number(rounds + j)

            def row(step, total, j=j, left=left, count=count):
                column = functools.partial(visit, j, left, step)
                return lax.fori_loop(0, count, column, total)

            for c, part in enumerate(lax.fori_loop(0, steps, row, (zero,) * parts)):
                store(sums_ref.at[j % 2, :, c], part)
            plgpu.commit_smem()
            for c in range(parts):
                warps = [load(sums_ref.at[j % 2, w, c], of_sums) for w in range(WARPS)]
                store(
                    out_ref.at[box, line * q + j, c], sum(warps[1:], warps[0]).astype(table.dtype)
                )

    (out,) = gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((b * n, p * q, parts, BLOCK), table.dtype)],
        scratch_types=[plgpu.SMEM((2, WARPS, parts, BLOCK), jnp.float32)],
        interpret=interpret_params(interpret),
        kernel_name="roi_align",
        grid=(b * n * p,),
        grid_names=("line_of_box",),
    )(
        table.reshape(-1, parts, BLOCK),
        *(x.reshape(b * n, *x.shape[2:]) for x in (jnp.concatenate(numbers, -1), rows, columns)),
    )
    return out.reshape(b, n, p, q, -1)

"""Compute the back of the mixer, its output projection, the residual sum and the next RMSNorm as one Mosaic GPU kernel.

    g = LayerNorm((y_f + y_b)/2 + (D_f c_f + D_b c_b)/2) · silu(z),   c = silu(conv(x)), recomputed
    r = residual + g W
    h = r / sqrt(mean(r²) + eps) · gain

`mosaic_back` defines the first line. g W never exists in global memory, and g only where it is kept for the gradient of
W. A thread block computes 64 rows of the product: `PER_TILE` segments of lines of 16 rows each. A segment shorter than
16 tokens has its middle tokens twice. The two warpgroups of a block share the tokens of a segment, then the columns of
the product, then the segments of the tile. One part of shared memory holds g. The tiles of x, z and s, parts of W, and
the product use the other part in turn.
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

from pallas_kernels.mixer_core.grid import Grid
from pallas_kernels.mixer_core.mosaic_common import (
    BLOCK,
    blocked,
    convolve,
    read_row,
    row_layout,
    silu,
)
from pallas_kernels.mosaic import (
    PROCESSORS,
    SHARED_MEMORY,
    gpu_kernel,
    interpret_params,
    reduced,
    store,
    tiled,
)

TILE = 64  # rows of a thread block's product, as many as one wgmma instruction takes
ROWS = 16  # rows of the tile that a segment takes: 8 for each warpgroup
PER_TILE = TILE // ROWS
WARPGROUPS = 2
RESIDENT = 2  # thread blocks of a processor
OVERHEAD = 3 * 1024  # bytes of shared memory for barriers, alignment and the driver
PART = (
    64  # rows of W that shared memory holds at a time: 128 bytes of W's transpose, one swizzled row
)
STAGES = 2  # parts of W on their way
COLUMNS = 64  # of the product that a warp holds at a time of each row
PADDING = 8  # columns; keeps the rows of the product in different banks


class Layouts:
    """Register layouts: a row of channels per thread block, whole tokens per warp."""

    def __init__(self):
        self.channels = row_layout(BLOCK)
        base, self.tokens = tiled(((4, BLOCK), (1, BLOCK), (1, 4)), (-6,), (-3,), -1)
        self.of_channels, self.of_tokens = reduced(base, (0,)), reduced(base, (1,))
        base, self.outputs = tiled(((4, COLUMNS), (1, COLUMNS), (1, 2)), (-6,), (-3,), -1)
        self.of_columns, self.of_outputs = reduced(base, (0,)), reduced(base, (1,))


def spread(value: jax.Array, shape: tuple[int, int], axis: int, layout) -> jax.Array:
    """Repeat a vector along the other axis of a token tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(value, shape, (axis,)), layout)


def mean(blocks: list[jax.Array]) -> jax.Array:
    """Average over the channels of tokens given as blocks of channels."""
    total = functools.reduce(jnp.add, blocks)
    return jnp.sum(total, axis=1) * (1.0 / (len(blocks) * blocks[0].shape[1]))


@dataclasses.dataclass(frozen=True)
class Work:
    """How the segments are shared by the thread blocks, and the shared memory of a block."""

    grid: Grid
    outputs: int

    @property
    def channel_blocks(self) -> int:
        return self.grid.width // BLOCK

    @property
    def per_line(self) -> int:
        return self.grid.tokens // self.grid.segment

    @property
    def segments(self) -> int:
        """Segments of the whole batch."""
        return self.grid.batch * self.grid.lines * self.per_line

    @property
    def short(self) -> int:
        """Thread blocks that take half as many segments as the others.

        They are the second ones of every processor. Otherwise all blocks would load, convolve and multiply at the same
        time, and each would wait for what the others keep busy.
        """
        return PROCESSORS if self.segments > 2 * PROCESSORS * PER_TILE else 0

    @property
    def thread_blocks(self) -> int:
        return pl.cdiv(self.segments + self.short * PER_TILE // 2, PER_TILE)

    @property
    def half(self) -> int:
        """Tokens of a segment that a warpgroup convolves."""
        return pl.cdiv(self.grid.segment, WARPGROUPS)

    def share(self, thread_block):
        """Return the first segment of a thread block and the segment behind its last one."""
        after = lax.max(thread_block - PROCESSORS, 0) if self.short else 0
        fewer = lax.min(after, self.short) * (PER_TILE // 2)
        first = thread_block * PER_TILE - fewer
        is_short = (
            jnp.logical_and(thread_block >= PROCESSORS, after < self.short) if self.short else False
        )
        size = jnp.where(is_short, PER_TILE // 2, PER_TILE)
        return first, lax.min(first + size, self.segments)

    def place(self, segment):
        """Return image, line and first token of a segment."""
        line = lax.div(segment, self.per_line)
        start = lax.rem(segment, self.per_line) * self.grid.segment
        return lax.div(line, self.grid.lines), lax.rem(line, self.grid.lines), start

    def unsupported(self) -> str | None:
        """Return why no thread block can do this work, or None."""
        if self.channel_blocks > 3:
            return f"{self.grid.width} channels do not fit registers and shared memory; 384 do"
        if self.outputs % COLUMNS:
            return f"{self.outputs} columns of the product are no multiple of {COLUMNS}"
        if self.shared_memory + OVERHEAD > SHARED_MEMORY // RESIDENT:
            return f"{self.outputs} columns of the product do not fit shared memory"
        return None

    @property
    def shared_memory(self) -> int:
        """Bytes of a thread block's tiles."""
        width = self.grid.width
        x_rows = WARPGROUPS * self.half + 2 * self.grid.halo
        g, tiles = TILE * width * 2, (2 * x_rows + 6 * ROWS) * width
        return g + max(tiles, STAGES * self.outputs * PART * 2, TILE * (self.outputs + PADDING) * 4)

    def scratch(self, dtype):
        """Return the shared memory and the barriers of a thread block."""
        transforms: Any = plgpu  # mypy takes them for abstract classes
        swizzled = (transforms.TilingTransform((8, PART)), transforms.SwizzleTransform(128))
        x_rows = WARPGROUPS * self.half + 2 * self.grid.halo
        per_group = self.outputs // WARPGROUPS
        return [
            plgpu.SMEM((TILE, self.grid.width), dtype, transforms=swizzled),
            plgpu.RefUnion(
                [
                    plgpu.SMEM((x_rows, self.channel_blocks, BLOCK), dtype),
                    plgpu.SMEM((self.channel_blocks, ROWS, BLOCK), dtype),
                    plgpu.SMEM((self.channel_blocks, ROWS, BLOCK), jnp.float32),
                ],
                [plgpu.SMEM((WARPGROUPS, STAGES, per_group, PART), dtype, transforms=swizzled)],
                [plgpu.SMEM((TILE, self.outputs + PADDING), jnp.float32)],
            ),
            plgpu.Barrier(num_arrivals=3),  # x
            plgpu.Barrier(num_arrivals=self.channel_blocks),  # z
            plgpu.Barrier(num_arrivals=1, num_barriers=WARPGROUPS * STAGES),  # parts of W
            plgpu.Barrier(num_arrivals=WARPGROUPS),  # both warpgroups
        ]


@functools.partial(jax.jit, static_argnames=("grid", "eps", "norm_eps", "with_g", "interpret"))
def back_project(
    xz, y, residual, kernels, biases, D, scale, shift, weight, gain, keep, grid: Grid,
    *, eps: float, norm_eps: float, with_g: bool = False, interpret: bool,
):  # fmt: skip
    """Apply the back of the mixer, project, add to the residual stream, and normalise the sum.

    Args:
        xz: ``b rows columns 2e``, x then z, in half precision.
        y: scan outputs, forward and backward, ``b lines e`` float32 each.
        residual: ``b rows columns d`` float32.
        kernels: of the convolutions, ``2 k e`` float32.
        biases, D: ``2 e`` float32.
        scale, shift: parameters of the LayerNorm, ``e`` float32.
        weight: transpose of the projection, ``d e`` in xz's dtype.
        gain: of the RMSNorm, ``d`` float32.
        keep: factors of each image's product, ``b`` float32; or None.
        grid: how the tokens are cut: segments of 8 to 16 tokens; `per_block` is not used.
        eps, norm_eps: epsilons of LayerNorm and RMSNorm.
        with_g: return g as well.
        interpret: run in Pallas' interpreter.

    Returns:
        The new residual stream, as `residual`; the normalised tokens, ``b rows columns d`` in xz's dtype; and if
        asked for g, ``b rows columns e``.
    """
    work, layouts = Work(grid, weight.shape[0]), Layouts()
    blocks, half, halo, segment = work.channel_blocks, work.half, grid.halo, grid.segment
    per_group = work.outputs // WARPGROUPS
    parts, columns = grid.width // PART, work.outputs // COLUMNS

    def body(*refs):
        xz_ref, *y_refs, residual_ref, k_ref, b_ref, D_ref, scale_ref = refs[:8]
        shift_ref, weight_ref, gain_ref, *others = refs[8:-6]
        keep_ref = others.pop(0) if keep is not None else None
        sum_ref, normed_ref, *g_refs = others
        g_tile, union, x_barrier, z_barrier, w_barrier, both = refs[-6:]
        (x_tile, z_tile, s_tile), (w_tile,), (product_tile,) = union
        group = lax.axis_index("warpgroup")
        first, stop = work.share(lax.axis_index("thread_block"))

        def fetch_x(index):
            @pl.when(jnp.logical_and(group == 0, index < stop))
            def _():
                image, line, start = work.place(index)
                channels = pl.ds(0, blocks)
                grid.fetch_with_halo(xz_ref, x_tile, x_barrier, image, line, start, channels)

        def fetch_z(index):
            @pl.when(jnp.logical_and(group == 0, index < stop))
            def _():
                image, line, start = work.place(index)
                for b in range(blocks):
                    part = grid.part(xz_ref, image, line, start, segment, blocks + b)
                    plgpu.copy_gmem_to_smem(part, z_tile.at[b, pl.ds(0, segment)], z_barrier)

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)

        row = lambda ref: read_row(ref, layouts.channels)  # noqa: E731

        def repeated(index):
            """Average both scans' outputs for the segment's line."""
            image, line, _ = work.place(lax.min(index, stop - 1))
            sides = [[row(ref.at[image, line, b]) for ref in y_refs] for b in range(blocks)]
            return [(forward + backward) * 0.5 for forward, backward in sides]

        fetch_x(first)
        fetch_z(first)

        def mix(of_line):
            """Write s of this warpgroup's half of the segment."""
            begin = group * half
            x_row = lambda t, b: row(x_tile.at[begin + t, b])  # noqa: E731
            window = [[x_row(j, b) for j in range(2 * halo)] for b in range(blocks)]
            for t in range(half):
                for b in range(blocks):
                    window[b].append(x_row(t + 2 * halo, b))
                    s = of_line[b]
                    for d in (0, 1):
                        c = convolve(window[b], taps[b][d], bias[b][d], bool(d))
                        s = s + skip[b][d] * silu(c, layouts.channels, interpret, xz.dtype)
                    store(s_tile.at[b, begin + t], s)
                    window[b].pop(0)

        def finish(item):
            """Write g of this warpgroup's 8 tokens of the segment."""
            at, shape = pl.ds(group * (segment - 8), 8), (8, BLOCK)
            load = lambda ref: plgpu.load(ref, layout=layouts.tokens, optimized=False)  # noqa: E731
            vector = lambda ref: plgpu.load(ref, layout=layouts.of_channels, optimized=False)  # noqa: E731
            s = [load(s_tile.at[b, at]) for b in range(blocks)]
            average = spread(mean(s), shape, 0, layouts.tokens)
            s = [part - average for part in s]
            deviation = lax.rsqrt(mean([part * part for part in s]) + eps)
            deviation = spread(deviation, shape, 0, layouts.tokens)
            rows = pl.ds(item * ROWS + group * 8, 8)
            for b in range(blocks):
                gamma, beta = (
                    spread(vector(ref.at[b]), shape, 1, layouts.tokens)
                    for ref in (scale_ref, shift_ref)
                )
                z = load(z_tile.at[b, at]).astype(jnp.float32)
                gate = silu(z, layouts.tokens, interpret, xz.dtype)
                value = ((s[b] * deviation * gamma + beta) * gate).astype(xz.dtype)
                store(g_tile.at[rows, pl.ds(b * BLOCK, BLOCK)], value)

        def item_of(index, of_line):
            plgpu.barrier_wait(x_barrier)
            mix(of_line)
            meet()
            fetch_x(index + 1)
            plgpu.barrier_wait(z_barrier)
            finish(index - first)
            of_line = repeated(index + 1)
            meet()
            fetch_z(index + 1)
            return of_line

        taps = [
            [[row(k_ref.at[d, j, b]) for j in range(grid.taps)] for d in (0, 1)]
            for b in range(blocks)
        ]
        bias = [[row(b_ref.at[d, b]) for d in (0, 1)] for b in range(blocks)]
        skip = [[row(D_ref.at[d, b]) * 0.5 for d in (0, 1)] for b in range(blocks)]
        lax.fori_loop(first, stop, item_of, repeated(first))

        def fetch_weight(part):
            stage = part % STAGES
            plgpu.copy_gmem_to_smem(
                weight_ref.at[pl.ds(group * per_group, per_group), pl.ds(part * PART, PART)],
                w_tile.at[group, stage],
                w_barrier.at[group * STAGES + stage],
            )

        def multiply(accumulator):
            """Write this warpgroup's columns of the product."""
            for part in range(parts):
                stage = part % STAGES
                plgpu.barrier_wait(w_barrier.at[group * STAGES + stage])
                weights = w_tile.at[group, stage].transpose((1, 0))
                plgpu.wgmma(accumulator, g_tile.at[:, pl.ds(part * PART, PART)], weights)
                plgpu.wgmma_wait(0)
                if part + STAGES < parts:
                    plgpu.commit_smem()  # No warp reads this part any more.
                    fetch_weight(part + STAGES)
            product = accumulator[...]
            meet()  # Nobody reads W any more.
            store(product_tile.at[:, pl.ds(group * per_group, per_group)], product)

        # Tokens of a segment and rows of the tile, four at a time.
        fours = ((0, 0), (4, 4), (segment - 8, 8), (segment - 4, 12))

        def tokens(ref, index, start, c, size=4):
            image, line, begin = work.place(index)
            return grid.part(ref, image, line, begin + start, size, c)

        load = lambda ref: plgpu.load(ref, layout=layouts.outputs, optimized=False)  # noqa: E731

        def read_residual(index):
            index = lax.min(index, stop - 1)
            return [
                [load(tokens(residual_ref, index, start, c)) for c in range(columns)]
                for start, _ in fours
            ]

        def add(index, item, residual):
            """Write the sums and the normalised tokens of a segment."""
            vector = lambda ref: plgpu.load(ref, layout=layouts.of_columns, optimized=False)  # noqa: E731
            gains = [
                spread(vector(gain_ref.at[c]), (4, COLUMNS), 1, layouts.outputs)
                for c in range(columns)
            ]
            for (start, row), values in zip(fours, residual, strict=True):
                at = pl.ds(item * ROWS + row, 4)
                update = [
                    load(product_tile.at[at, pl.ds(c * COLUMNS, COLUMNS)]) for c in range(columns)
                ]
                if keep_ref is not None:
                    factor = keep_ref[work.place(index)[0]]
                    update = [part * factor for part in update]
                new = [old + part for old, part in zip(values, update, strict=True)]
                scaling = lax.rsqrt(mean([part * part for part in new]) + norm_eps)
                scaling = spread(scaling, (4, COLUMNS), 0, layouts.outputs)
                for c, part in enumerate(new):
                    store(tokens(sum_ref, index, start, c), part)
                    store(
                        tokens(normed_ref, index, start, c),
                        (part * scaling * gains[c]).astype(xz.dtype),
                    )
            for ref in g_refs:  # Swizzled tiles are read by eights.
                for start, row in fours[::2]:
                    for b in range(blocks):
                        g = g_tile.at[pl.ds(item * ROWS + row, 8), pl.ds(b * BLOCK, BLOCK)]
                        g = plgpu.load(g, layout=layouts.tokens, optimized=False)
                        store(tokens(ref, index, start, b, 8), g)

        for part in range(min(STAGES, parts)):
            fetch_weight(part)
        items = [group * (PER_TILE // WARPGROUPS) + i for i in range(PER_TILE // WARPGROUPS)]
        residuals = [read_residual(first + item) for item in items]
        pl.run_scoped(multiply, plgpu.ACC((TILE, per_group), jnp.float32))
        meet()
        for item, residual in zip(items, residuals, strict=True):
            write = functools.partial(add, first + item, item, residual)
            pl.when(first + item < stop)(write)

    by_columns = lambda x: x.reshape(*x.shape[:-1], columns, COLUMNS)  # noqa: E731
    old = by_columns(residual)
    g_type = jax.ShapeDtypeStruct((*xz.shape[:3], blocks, BLOCK), xz.dtype)
    new, normed, *g = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(old.shape, jnp.float32),
            jax.ShapeDtypeStruct(old.shape, xz.dtype),
            *[g_type] * with_g,
        ],
        scratch_types=work.scratch(xz.dtype),
        interpret=interpret_params(interpret, WARPGROUPS),
        kernel_name="mixer_back_project",
        grid=(work.thread_blocks,),
        grid_names=("thread_block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
    )(
        *map(blocked, (xz, *y)), old, *map(blocked, (kernels, biases, D, scale, shift)),
        weight, by_columns(gain), *(() if keep is None else (keep,)),
    )  # fmt: skip
    g = [x.reshape(*xz.shape[:3], grid.width) for x in g]
    return new.reshape(residual.shape), normed.reshape(residual.shape), *g

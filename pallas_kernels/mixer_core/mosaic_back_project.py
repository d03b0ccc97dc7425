"""Compute the back of the mixer, its output projection, the residual sum and the next RMSNorm as one Mosaic GPU kernel.

    g = LayerNorm((y_f + y_b)/2 + skip) · silu(z)
    r = residual + g W
    h = r / sqrt(mean(r²) + eps) · gain

r is float32 or bfloat16, and h is that of the rounded r. The front wrote the skips; `mosaic_back` computes the first
line by itself. Neither g nor g W exists in global memory. A thread block computes 64 rows of the product: `PER_TILE`
segments of rows of the grid, 16 rows of the tile each. A segment shorter than 16 tokens has its middle tokens twice.
Its two warpgroups share the segments, then the columns of the product, then the segments again. g takes the place of
the skips in shared memory, parts of W that of z, and the product that of g.
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

from pallas_kernels.mixer_core.grid import largest_divisor
from pallas_kernels.mixer_core.mosaic_common import BLOCK, blocked, silu
from pallas_kernels.mosaic import (
    PROCESSORS,
    SHARED_MEMORY,
    gpu_kernel,
    interpret_params,
    reduced,
    store,
    tiled,
)

TILE = 64  # rows of a product, as many as one wgmma instruction takes
ROWS = 16  # rows of the tile that a segment takes
PER_TILE = TILE // ROWS
WARPGROUPS = 2
PER_GROUP = PER_TILE // WARPGROUPS
RESIDENT = 2  # thread blocks of a processor
STAGES = 2  # parts of W on their way to a warpgroup
OVERHEAD = 3 * 1024  # bytes of shared memory for barriers, alignment and the driver
PART = 64  # rows of W that one copy brings: 128 bytes of W's transpose, one swizzled row
COLUMNS = 64  # of the product that a warp holds at a time of each row
PADDING = 8  # columns; keeps the rows of the product in different banks


class Layouts:
    """Register layouts: whole tokens per warp."""

    def __init__(self):
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


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Round float32 numbers to those that `dtype` can hold."""
    return x.astype(dtype).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Work:
    """Describe one call: the grid of tokens, the widths, and how thread blocks share the segments."""

    batch: int
    rows: int
    columns: int
    transposed: bool
    width: int
    outputs: int

    @property
    def channel_blocks(self) -> int:
        return self.width // BLOCK

    @property
    def segment(self) -> int:
        """Tokens of a segment."""
        return largest_divisor(self.columns, ROWS)

    @property
    def per_row(self) -> int:
        """Segments of a row of the grid."""
        return self.columns // self.segment

    @property
    def segments(self) -> int:
        """Segments of the whole batch."""
        return self.batch * self.rows * self.per_row

    @property
    def short(self) -> int:
        """Thread blocks that take half as many segments as the others.

        They are the second ones of every processor. Otherwise all blocks would load and multiply at the same time, and
        each would wait for what the others keep busy.
        """
        return PROCESSORS if self.segments > 2 * PROCESSORS * PER_TILE else 0

    @property
    def per_block(self) -> int:
        """Segments of a thread block that is not short: fewer than a tile has if that occupies more processors."""
        return min(PER_TILE, pl.cdiv(self.segments, PROCESSORS))

    @property
    def thread_blocks(self) -> int:
        return pl.cdiv(self.segments + self.short * PER_TILE // 2, self.per_block)

    @property
    def whole(self) -> bool:
        """Whether all of W is in shared memory from the start: where a processor has no second thread block."""
        room = SHARED_MEMORY - OVERHEAD - self._g_bytes - self.per_block * ROWS * self.width * 2
        return self.thread_blocks <= PROCESSORS and self.outputs * self.width * 2 <= room

    @property
    def stages(self) -> int:
        """Parts of W on their way to a warpgroup."""
        return self.width // PART if self.whole else STAGES

    def share(self, thread_block):
        """Return the first segment of a thread block and the segment behind its last one."""
        after = lax.max(thread_block - PROCESSORS, 0) if self.short else 0
        fewer = lax.min(after, self.short) * (PER_TILE // 2)
        first = thread_block * self.per_block - fewer
        is_short = (
            jnp.logical_and(thread_block >= PROCESSORS, after < self.short) if self.short else False
        )
        size = jnp.where(is_short, PER_TILE // 2, self.per_block)
        return first, lax.min(first + size, self.segments)

    def place(self, segment):
        """Return image, row and first column of a segment."""
        row = lax.div(segment, self.per_row)
        start = lax.rem(segment, self.per_row) * self.segment
        return lax.div(row, self.rows), lax.rem(row, self.rows), start

    def unsupported(self) -> str | None:
        """Return why no thread block can do this work, or None."""
        if self.segment < 8:
            return f"rows of {self.columns} tokens do not cut into equal segments of 8 to 16"
        if self.channel_blocks > 3:
            return f"{self.width} channels do not fit registers and shared memory; 384 do"
        if self.outputs % COLUMNS:
            return f"{self.outputs} columns of the product are no multiple of {COLUMNS}"
        if self.shared_memory + OVERHEAD > SHARED_MEMORY // RESIDENT:
            return f"{self.outputs} columns of the product do not fit shared memory"
        return None

    @property
    def shared_memory(self) -> int:
        """Bytes of a thread block's tiles, with another one on the same processor."""
        return self._g_bytes + max(TILE * self.width, STAGES * self.outputs * PART) * 2

    @property
    def _g_bytes(self) -> int:
        return max(TILE * self.width * 2, TILE * (self.outputs + PADDING) * 4)

    def scratch(self, dtype, interpret: bool):
        """Return the shared memory and the barriers of a thread block.

        An eight of g takes the bytes of its skips. The interpreter would call that a race, because all of a union is
        one buffer to it.
        """
        transforms: Any = plgpu  # mypy takes them for abstract classes
        swizzled = (transforms.TilingTransform((8, PART)), transforms.SwizzleTransform(128))
        by_eights = plgpu.SMEM((TILE // 8, 8, self.channel_blocks, BLOCK), dtype)
        g = plgpu.SMEM((TILE, self.width), dtype, transforms=swizzled)
        product = plgpu.SMEM((TILE, self.outputs + PADDING), jnp.float32)
        z = plgpu.SMEM((self.per_block * ROWS // 8, *by_eights.shape[1:]), dtype)
        parts_of_weight = (WARPGROUPS, self.stages, self.outputs // WARPGROUPS, PART)
        weight = plgpu.SMEM(parts_of_weight, dtype, transforms=swizzled)
        return [
            plgpu.RefUnion(*[by_eights] * (not interpret), g, product),
            (z, weight) if self.whole else plgpu.RefUnion(z, weight),
            plgpu.Barrier(num_arrivals=4, num_barriers=PER_TILE),  # skips and z of a segment
            plgpu.Barrier(num_arrivals=1, num_barriers=WARPGROUPS * self.stages),  # parts of W
            plgpu.Barrier(num_arrivals=WARPGROUPS),  # both warpgroups
            *[by_eights] * interpret,
        ]


@functools.partial(jax.jit, static_argnames=("work", "eps", "norm_eps", "interpret"))
def back_project(
    skip, z, y, residual, scale, shift, weight, gain, keep, work: Work,
    *, eps: float, norm_eps: float, interpret: bool,
):  # fmt: skip
    """Apply the back of the mixer, project, add to the residual stream, and normalise the sum.

    Args:
        skip: ``b rows columns e`` in half precision.
        z: ``b rows columns e``; or x and z, ``b rows columns 2e``.
        y: scan outputs, forward and backward, ``b lines e`` float32 each.
        residual: ``b rows columns d`` float32 or bfloat16.
        scale, shift: parameters of the LayerNorm, ``e`` float32.
        weight: transpose of the projection, ``d e`` in skip's dtype.
        gain: of the RMSNorm, ``d`` float32.
        keep: factors of each image's product, ``b`` float32; or None.
        work: the sizes.
        eps, norm_eps: epsilons of LayerNorm and RMSNorm.
        interpret: run in Pallas' interpreter.

    Returns:
        The new residual stream, as `residual`; and the normalised tokens, ``b rows columns d`` in skip's dtype.
    """
    layouts = Layouts()
    blocks, segment = work.channel_blocks, work.segment
    per_group = work.outputs // WARPGROUPS
    parts, stages, columns = work.width // PART, work.stages, work.outputs // COLUMNS
    before_z = z.shape[-1] // BLOCK - blocks
    eights = ((0, 0), (segment - 8, 8))  # first token of the segment, row of the tile
    fours = ((0, 0), (4, 4), (segment - 8, 8), (segment - 4, 12))
    ends = -6 if interpret else -5  # where the results end

    def body(*refs):
        skip_ref, z_ref, *y_refs, residual_ref, scale_ref, shift_ref, weight_ref = refs[:8]
        gain_ref, *others = refs[8:ends]
        keep_ref = others.pop(0) if keep is not None else None
        sum_ref, normed_ref = others
        (*shared, g_tile, product_tile), (z_tile, w_tile), *scratch = refs[ends:]
        barrier, w_barrier, both, *apart = scratch
        (skip_tile,) = shared + apart
        group = lax.axis_index("warpgroup")
        first, stop = work.share(lax.axis_index("thread_block"))
        items = [i * WARPGROUPS + group for i in range(PER_GROUP)]

        def loaded(layout):
            return functools.partial(plgpu.load, layout=layout, optimized=False)

        def tokens(ref, index, start, size, *c):
            image, row, begin = work.place(index)
            return ref.at[image, row, pl.ds(begin + start, size), *c]

        def eight(item, row):
            return item * (ROWS // 8) + row // 8

        def fetch(item):
            """Fetch skips and z of a segment."""
            for start, row in eights:
                for ref, tile, b in ((skip_ref, skip_tile, 0), (z_ref, z_tile, before_z)):
                    plgpu.copy_gmem_to_smem(
                        tokens(ref, first + item, start, 8, pl.ds(b, blocks)),
                        tile.at[eight(item, row)],
                        barrier.at[item],
                    )

        def scanned(index, start):
            """Return both scans' outputs for eight tokens, added up."""
            image, row, begin = work.place(index)
            if work.transposed:
                load, at = loaded(layouts.tokens), pl.ds(begin + start, 8)
            else:
                load, at = loaded(layouts.of_channels), row
            sides = [[load(ref.at[image, at, b]) for ref in y_refs] for b in range(blocks)]
            sums = [forward + backward for forward, backward in sides]
            if not work.transposed:
                sums = [spread(x, (8, BLOCK), 1, layouts.tokens) for x in sums]
            return sums

        def gate(item):
            """Write g of a segment over its skips."""
            index, shape = first + item, (8, BLOCK)
            vector, load = loaded(layouts.of_channels), loaded(layouts.tokens)
            y = [scanned(index, start) for start, _ in eights]
            plgpu.barrier_wait(barrier.at[item])
            for (_, row), scans in zip(eights, y, strict=True):
                rows = eight(item, row)
                # Twice what the LayerNorm reads; hence four times eps.
                x = [
                    2.0 * load(skip_tile.at[rows, :, b]).astype(jnp.float32) + of_scans
                    for b, of_scans in enumerate(scans)
                ]
                plgpu.commit_smem()  # No warp reads these skips any more.
                average = spread(mean(x), shape, 0, layouts.tokens)
                x = [part - average for part in x]
                deviation = lax.rsqrt(mean([part * part for part in x]) + 4 * eps)
                deviation = spread(deviation, shape, 0, layouts.tokens)
                for b in range(blocks):
                    gamma, beta = (
                        spread(vector(ref.at[b]), shape, 1, layouts.tokens)
                        for ref in (scale_ref, shift_ref)
                    )
                    z = load(z_tile.at[rows, :, b]).astype(jnp.float32)
                    gated = silu(z, layouts.tokens, interpret, dtype)
                    value = ((x[b] * deviation * gamma + beta) * gated).astype(dtype)
                    at = pl.ds(item * ROWS + row, 8), pl.ds(b * BLOCK, BLOCK)
                    store(g_tile.at[at], value)

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)

        def fetch_weight(part):
            stage = part % stages
            plgpu.copy_gmem_to_smem(
                weight_ref.at[pl.ds(group * per_group, per_group), pl.ds(part * PART, PART)],
                w_tile.at[group, stage],
                w_barrier.at[group * stages + stage],
            )

        def fetch_weights():
            for part in range(min(stages, parts)):
                fetch_weight(part)

        def multiply(accumulator):
            """Write this warpgroup's columns of the product over g."""
            for part in range(parts):
                stage = part % stages
                plgpu.barrier_wait(w_barrier.at[group * stages + stage])
                weights = w_tile.at[group, stage].transpose((1, 0))
                plgpu.wgmma(accumulator, g_tile.at[:, pl.ds(part * PART, PART)], weights)
                if part + stages < parts:
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()  # No warp reads this part any more.
                    fetch_weight(part + stages)
            plgpu.wgmma_wait(0)
            product = accumulator[...]
            meet()  # Nobody reads g any more.
            store(product_tile.at[:, pl.ds(group * per_group, per_group)], product)

        def read_residual(index):
            index, load = lax.min(index, stop - 1), loaded(layouts.outputs)
            return [
                [load(tokens(residual_ref, index, start, 4, c)) for c in range(columns)]
                for start, _ in fours
            ]

        def add(item, residual):
            """Write the sums and the normalised tokens of a segment."""
            index, load, vector = first + item, loaded(layouts.outputs), loaded(layouts.of_columns)
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
                new = [
                    rounded(old.astype(jnp.float32) + part, stream)
                    for old, part in zip(values, update, strict=True)
                ]
                scaling = lax.rsqrt(mean([part * part for part in new]) + norm_eps)
                scaling = spread(scaling, (4, COLUMNS), 0, layouts.outputs)
                for c, part in enumerate(new):
                    store(tokens(sum_ref, index, start, 4, c), part.astype(stream))
                    normed = (part * scaling * gains[c]).astype(dtype)
                    store(tokens(normed_ref, index, start, 4, c), normed)

        def there(item, run, *arguments):
            """Run something if the thread block has the segment."""
            pl.when(first + item < stop)(functools.partial(run, item, *arguments))

        for item in items:
            there(item, fetch)
        if work.whole:
            fetch_weights()
        for item in items:
            there(item, gate)
        meet()  # z is read, and g written.
        if not work.whole:
            fetch_weights()
        residuals = [read_residual(first + item) for item in items]
        pl.run_scoped(multiply, plgpu.ACC((TILE, per_group), jnp.float32))
        meet()
        for item, residual in zip(items, residuals, strict=True):
            there(item, add, residual)

    dtype, stream = skip.dtype, residual.dtype
    by_columns = lambda x: x.reshape(*x.shape[:-1], columns, COLUMNS)  # noqa: E731
    old = by_columns(residual)
    new, normed = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(old.shape, stream),
            jax.ShapeDtypeStruct(old.shape, skip.dtype),
        ],
        scratch_types=work.scratch(skip.dtype, interpret),
        interpret=interpret_params(interpret, WARPGROUPS),
        kernel_name="mixer_back_project",
        grid=(work.thread_blocks,),
        grid_names=("thread_block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
    )(
        *map(blocked, (skip, z, *y)), old, *map(blocked, (scale, shift)),
        weight, by_columns(gain), *(() if keep is None else (keep,)),
    )  # fmt: skip
    return new.reshape(residual.shape), normed.reshape(residual.shape)

"""Compute the back of the mixer, its output projection, the residual sum and the next RMSNorm as one Mosaic GPU kernel.

    g = LayerNorm((y_f + y_b)/2 + skip) · silu(z)
    r = residual + g W
    h = r / sqrt(mean(r²) + eps) · gain

r is float32 or bfloat16, and h is that of the rounded r. The front wrote the skips; `mosaic_back` computes the first
line by itself. Neither g nor g W exists in global memory. A thread block computes 64 rows of the product: `PER_TILE`
segments of rows of the grid, 16 rows of the tile each. A segment shorter than 16 tokens has its middle tokens twice.
Its two warpgroups share the segments, then the columns of the product, then the segments again. g takes the place of
the skips in shared memory, a warpgroup's parts of W that of z of its own segments, and the product that of g.
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
from pallas_kernels.mixer_core.mosaic_common import BLOCK, blocked, scaled_silu, silu_scale
from pallas_kernels.mosaic import (
    PROCESSORS,
    SHARED_MEMORY,
    gpu_kernel,
    interpret_params,
    narrowed,
    reduced,
    store,
    tiled,
    widened,
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
        each would wait for what the others keep busy. There are none where a few thread blocks would be left for one
        more round because of them.
        """
        if self.segments <= 2 * PROCESSORS * PER_TILE:
            return 0
        tiles, more = pl.cdiv(self.segments, PER_TILE), PROCESSORS // 2
        rounds, with_short = (pl.cdiv(n, RESIDENT * PROCESSORS) for n in (tiles, tiles + more))
        return PROCESSORS if with_short == rounds else 0

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

    @property
    def early(self) -> bool:
        """Whether a stage has the place of z of one segment of the same warpgroup, which may fetch W into it."""
        same_size = self.outputs * PART // WARPGROUPS == ROWS * self.width
        return same_size and not self.whole and self.per_block == STAGES * WARPGROUPS

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

        An eight of g takes the bytes of its skips, and a part of W those of z of a segment. The interpreter would call
        that a race, because all of a union is one buffer to it.
        """
        transforms: Any = plgpu  # mypy takes them for abstract classes
        swizzled = (transforms.TilingTransform((8, PART)), transforms.SwizzleTransform(128))
        by_eights = plgpu.SMEM((TILE // 8, 8, self.channel_blocks, BLOCK), dtype)
        g = plgpu.SMEM((TILE, self.width), dtype, transforms=swizzled)
        product = plgpu.SMEM((TILE, self.outputs + PADDING), jnp.float32)
        z = plgpu.SMEM((self.per_block * ROWS // 8, *by_eights.shape[1:]), dtype)
        parts_of_weight = (self.stages, WARPGROUPS, self.outputs // WARPGROUPS, PART)
        weight = plgpu.SMEM(parts_of_weight, dtype, transforms=swizzled)
        return [
            plgpu.RefUnion(*[by_eights] * (not interpret), g, product),
            (z, weight) if self.whole or interpret else plgpu.RefUnion(z, weight),
            plgpu.Barrier(num_arrivals=2, num_barriers=PER_TILE),  # skips of a segment
            plgpu.Barrier(num_arrivals=2, num_barriers=PER_TILE),  # z of a segment
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
        y: scan outputs, forward and backward, ``b lines e`` float32 or bfloat16 each.
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
    ends = -7 if interpret else -6  # where the results end

    def body(*refs):
        skip_ref, z_ref, *y_refs, residual_ref, scale_ref, shift_ref, weight_ref = refs[:8]
        gain_ref, *others = refs[8:ends]
        keep_ref = others.pop(0) if keep is not None else None
        sum_ref, normed_ref = others
        (*shared, g_tile, product_tile), (z_tile, w_tile), *scratch = refs[ends:]
        skip_barrier, z_barrier, w_barrier, both, *apart = scratch
        (skip_tile,) = shared + apart
        group = lax.axis_index("warpgroup")
        first, stop = work.share(lax.axis_index("thread_block"))
        items = [i * WARPGROUPS + group for i in range(PER_GROUP)]

        def loaded(layout):
            return functools.partial(plgpu.load, layout=layout, optimized=False)

        wide = functools.partial(widened, interpret=interpret)
        half = functools.partial(narrowed, interpret=interpret)

        def tokens(ref, index, start, size, *c):
            image, row, begin = work.place(index)
            return ref.at[image, row, pl.ds(begin + start, size), *c]

        def eight(item, row):
            return item * (ROWS // 8) + row // 8

        def fetch(item, ref, tile, b, barrier):
            """Fetch skips or z of a segment; b is its first block of channels."""
            for start, row in eights:
                plgpu.copy_gmem_to_smem(
                    tokens(ref, first + item, start, 8, pl.ds(b, blocks)),
                    tile.at[eight(item, row)],
                    barrier.at[item],
                )

        def scanned(item):
            """Return both scans' outputs for the tokens of a segment, added up.

            They are one vector of channels if the tokens are of one line, and tokens by eights otherwise.
            """
            image, row, begin = work.place(lax.min(first + item, stop - 1))
            layout = layouts.tokens if work.transposed else layouts.of_channels
            load = loaded(layout)
            lines = [pl.ds(begin + start, 8) for start, _ in eights] if work.transposed else [row]
            sides = [
                [
                    [wide(load(ref.at[image, at, b]), layout) for ref in y_refs]
                    for b in range(blocks)
                ]
                for at in lines
            ]
            return [[forward + backward for forward, backward in of_blocks] for of_blocks in sides]

        def gate(item, y=None):
            """Write g of a segment over its skips."""
            shape = (8, BLOCK)
            vector, load = loaded(layouts.of_channels), loaded(layouts.tokens)
            y = scanned(item) if y is None else y
            if not work.transposed:
                y = [[spread(of_block, shape, 1, layouts.tokens) for of_block in y[0]]] * len(
                    eights
                )
            plgpu.barrier_wait(skip_barrier.at[item])
            # Twice what the LayerNorm reads; hence four times eps.
            x = [
                [
                    2.0 * wide(load(skip_tile.at[eight(item, row), :, b]), layouts.tokens)
                    + of_scans
                    for b, of_scans in enumerate(scans)
                ]
                for (_, row), scans in zip(eights, y, strict=True)
            ]
            plgpu.commit_smem()  # No warp reads these skips any more.
            statistics = []
            for of_blocks in x:
                average, square = mean(of_blocks), mean([part * part for part in of_blocks])
                inverse = lax.rsqrt(lax.max(square - average * average, 0.0) + 4 * eps)
                pair = inverse, -average * inverse
                statistics.append([spread(value, shape, 0, layouts.tokens) for value in pair])
            plgpu.barrier_wait(z_barrier.at[item])
            for b in range(blocks):
                gamma, beta = (
                    spread(vector(ref.at[b]), shape, 1, layouts.tokens)
                    for ref in (scale_ref, shift_ref)
                )
                for (_, row), of_blocks, (inverse, offset) in zip(
                    eights, x, statistics, strict=True
                ):
                    # exact, and two at a time
                    z = load(z_tile.at[eight(item, row), :, b]) * silu_scale(dtype)
                    gated = scaled_silu(wide(z, layouts.tokens), layouts.tokens, interpret, dtype)
                    normed = (of_blocks[b] * inverse + offset) * gamma + beta
                    at = pl.ds(item * ROWS + row, 8), pl.ds(b * BLOCK, BLOCK)
                    store(g_tile.at[at], half(normed * gated, dtype, layouts.tokens))

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)

        def fetch_weight(part):
            stage = part % stages
            plgpu.copy_gmem_to_smem(
                weight_ref.at[pl.ds(group * per_group, per_group), pl.ds(part * PART, PART)],
                w_tile.at[stage, group],
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
                weights = w_tile.at[stage, group].transpose((1, 0))
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
                stored = [
                    half(wide(old, layouts.outputs) + part, stream, layouts.outputs)
                    for old, part in zip(values, update, strict=True)
                ]
                new = [wide(part, layouts.outputs) for part in stored]
                scaling = lax.rsqrt(mean([part * part for part in new]) + norm_eps)
                scaling = spread(scaling, (4, COLUMNS), 0, layouts.outputs)
                for c, part in enumerate(new):
                    store(tokens(sum_ref, index, start, 4, c), stored[c])
                    normed = half(part * scaling * gains[c], dtype, layouts.outputs)
                    store(tokens(normed_ref, index, start, 4, c), normed)

        def there(item, run, *arguments):
            """Run something if the thread block has the segment."""
            pl.when(first + item < stop)(functools.partial(run, item, *arguments))

        # The scans' outputs of a line take few registers: read them before the copies occupy the memory. Of tokens of
        # several lines only the first segment's fit.
        y = [scanned(item) for item in (items[:1] if work.transposed else items)]
        for of_tokens in (
            (skip_ref, skip_tile, 0, skip_barrier),
            (z_ref, z_tile, before_z, z_barrier),
        ):
            for item in items:
                there(item, fetch, *of_tokens)
        if work.whole:
            fetch_weights()
        for i, item in enumerate(items):
            there(item, gate, *y[i : i + 1])
            if work.early and i < parts:
                plgpu.commit_smem()  # No warp reads this z any more.
                fetch_weight(i)
        meet()  # z is read, and g written.
        if not work.whole and not work.early:
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

"""Cut patches, project them, and add their positions as one Mosaic GPU kernel.

    tokens = rounded(patches W + table)
    normed = tokens / sqrt(mean(tokens²) + eps)

A warpgroup computes `TILE` tokens: the patches of one column of patches in `TILE` lines of patches. (A line is a row of
patches of an image.) One row of pixels of those patches is one part of the product; the copy engine brings it straight
from the image. All warpgroups of a thread block read the same parts of W, which are on their way from the L2 cache.
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

from pallas_kernels.mixer_core.mosaic_back_project import Layouts, mean, rounded, spread
from pallas_kernels.mosaic import (
    PROCESSORS,
    SHARED_MEMORY,
    gpu_kernel,
    interpret_params,
    store,
)

TILE = 64  # tokens of a product, as many as one wgmma instruction takes
LONGEST = 256  # numbers of a row of a box that the copy engine brings
CHUNK = 16  # numbers of a swizzled row of 32 bytes, which divide those of a patch's row of pixels
COLUMNS = 64  # of the product that a warp holds at a time of each token
WIDEST = 192  # columns of the product of a thread block
PADDING = 8  # columns; keeps the tokens of the product in different banks
OVERHEAD = 3 * 1024  # bytes of shared memory for barriers, alignment and the driver
LINES = 4  # tokens that a warpgroup ends at a time, one a warp


@dataclasses.dataclass(frozen=True)
class Work:
    """Describe one call: the grid of patches, the sizes, and how thread blocks share the tokens."""

    batch: int
    rows: int
    columns: int
    parts: int  # rows of pixels of a patch
    values: int  # numbers of a patch's row of pixels
    outputs: int
    processors: int = PROCESSORS

    @property
    def lines(self) -> int:
        return self.batch * self.rows

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.lines, TILE) * self.columns

    @property
    def width(self) -> int:
        """Columns of the product of a thread block."""
        fitting = range(COLUMNS, min(self.outputs, WIDEST) + 1, COLUMNS)
        return max(n for n in fitting if self.outputs % n == 0)

    @property
    def whole(self) -> bool:
        """Whether a thread block has all columns of its tokens."""
        return self.width == self.outputs

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a thread block: as many as end first."""
        across = self.outputs // self.width
        waves = lambda n: pl.cdiv(pl.cdiv(self.tiles, n) * across, self.processors)  # noqa: E731
        return min((3, 2, 1), key=lambda n: waves(n) * n)

    @property
    def stages(self) -> int:
        """Parts on their way."""
        part = (self.warpgroups * TILE + self.width) * self.values * 2
        return min(self.parts, 5, (SHARED_MEMORY - OVERHEAD) // part)

    def unsupported(self) -> str | None:
        """Return why no thread block can do this work, or None."""
        if self.outputs % COLUMNS:
            return f"{self.outputs} channels are no multiple of {COLUMNS}"
        if self.values % CHUNK or self.values > LONGEST:
            return (
                f"a patch's row of {self.values} numbers is no multiple of {CHUNK} up to {LONGEST}"
            )
        if self.lines < TILE or self.lines % 8:
            return f"{self.lines} lines of patches are fewer than {TILE} or no multiple of 8"
        if self.rows < LINES:
            return f"{self.rows} rows of patches are fewer than {LINES}"
        if self.stages < min(self.parts, 2):
            return "two parts of tokens and weights do not fit shared memory"
        return None

    def scratch(self, dtype):
        """Return the shared memory and the barriers of a thread block."""
        transforms: Any = plgpu  # mypy takes them for abstract classes
        swizzled = (transforms.TilingTransform((8, CHUNK)), transforms.SwizzleTransform(32))
        groups, stages = self.warpgroups, self.stages
        tokens = plgpu.SMEM((groups, stages, TILE, self.values), dtype, transforms=swizzled)
        weight = plgpu.SMEM((stages, self.values, self.width), dtype, transforms=swizzled)
        product = plgpu.SMEM((groups, TILE, self.width + PADDING), jnp.float32)
        return [
            plgpu.RefUnion((tokens, weight), product),
            plgpu.Barrier(num_arrivals=1, num_barriers=groups * stages),  # tokens are there
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),  # weights are
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),  # weights are read
            plgpu.Barrier(num_arrivals=groups),  # all parts are
        ]


@functools.partial(jax.jit, static_argnames=("work", "stream", "eps", "interpret"))
def embed(images, weight, table, work: Work, *, stream: Any, eps: float, interpret: bool):
    """Embed images.

    Args:
        images: ``b h w c`` in half precision; whole patches.
        weight: ``v d``, images' dtype; v a patch's numbers: rows of pixels, pixels, channels.
        table: positions and bias ``rows columns d`` float32.
        work: the sizes.
        stream: dtype of the tokens.
        eps: of the norm.
        interpret: run in Pallas' interpreter.

    Returns:
        Tokens ``b l d`` in `stream`; and, if a thread block has all of a token, the normalised ones in images' dtype.
    """
    layouts = Layouts()
    groups, stages, parts, values = work.warpgroups, work.stages, work.parts, work.values
    columns, whole, dtype = work.width // COLUMNS, work.whole, images.dtype

    def body(images_ref, weight_ref, table_ref, *refs):
        *out_refs, ((tokens_tile, w_tile), product_tile), barrier, w_barrier, free, all_read = refs
        group = lax.axis_index("warpgroup")
        part_of = lax.axis_index("columns")
        index = lax.axis_index("block") * groups + group
        tile = lax.min(index, work.tiles - 1)
        begin = lax.div(tile, work.columns) * TILE
        first = lax.min(begin, work.lines - TILE)
        column = lax.rem(tile, work.columns)

        def fetch_tokens(step):
            start = step * work.columns * values + column * values
            plgpu.copy_gmem_to_smem(
                images_ref.at[pl.ds(first, TILE), pl.ds(start, values)],
                tokens_tile.at[group, step % stages],
                barrier.at[group * stages + step % stages],
            )

        def fetch_weight(step):
            plgpu.copy_gmem_to_smem(
                weight_ref.at[
                    pl.ds(step * values, values), pl.ds(part_of * work.width, work.width)
                ],
                w_tile.at[step % stages],
                w_barrier.at[step % stages],
            )

        def release(step):
            if step + stages >= parts:
                return
            plgpu.commit_smem()  # No warp reads this part of the tokens any more.
            fetch_tokens(step + stages)
            plgpu.barrier_arrive(free.at[step % stages])

            @pl.when(group == 0)
            def _():
                plgpu.barrier_wait(free.at[step % stages])
                fetch_weight(step + stages)

        def multiply(accumulator):
            for step in range(parts):
                slot = step % stages
                plgpu.barrier_wait(barrier.at[group * stages + slot])
                plgpu.barrier_wait(w_barrier.at[slot])
                plgpu.wgmma(accumulator, tokens_tile.at[group, slot], w_tile.at[slot])
                if step:
                    plgpu.wgmma_wait(1)
                    release(step - 1)
            plgpu.wgmma_wait(0)
            product = accumulator[...]
            plgpu.barrier_arrive(all_read)
            plgpu.barrier_wait(all_read)
            store(product_tile.at[group, :, pl.ds(0, work.width)], product)

        def end(quad, _):
            load = functools.partial(plgpu.load, layout=layouts.outputs, optimized=False)
            row, at = first + quad * LINES, part_of * columns
            lines, positions = pl.ds(row, LINES), pl.ds(lax.rem(row, work.rows), LINES)
            tokens = []
            for c in range(columns):
                here = pl.ds(quad * LINES, LINES), pl.ds(c * COLUMNS, COLUMNS)
                value = load(product_tile.at[group, *here]) + load(
                    table_ref.at[positions, column, at + c]
                )
                tokens.append(rounded(value, stream))
            for c, part in enumerate(tokens):
                store(out_refs[0].at[lines, column, at + c], part.astype(stream))
            if whole:
                scaling = lax.rsqrt(mean([part * part for part in tokens]) + eps)
                scaling = spread(scaling, (LINES, COLUMNS), 0, layouts.outputs)
                for c, part in enumerate(tokens):
                    store(out_refs[1].at[lines, column, at + c], (part * scaling).astype(dtype))
            return ()

        for step in range(stages):
            fetch_tokens(step)

        @pl.when(group == 0)
        def _():
            for step in range(stages):
                fetch_weight(step)

        pl.run_scoped(multiply, plgpu.ACC((TILE, work.width), jnp.float32))
        plgpu.commit_smem()
        # Write every token once: those that two tiles share with the first tile.
        new = jnp.where(index < work.tiles, lax.div(begin - first, LINES), TILE // LINES)
        lax.fori_loop(new, TILE // LINES, end, ())

    by_columns = lambda x: x.reshape(*x.shape[:-1], -1, COLUMNS)  # noqa: E731
    # Four lines behind each other begin anywhere in the table.
    table = jnp.concatenate([table, table[: LINES - 1]])
    shape = (work.lines, work.columns, work.outputs // COLUMNS, COLUMNS)
    out = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(shape, stream),
            jax.ShapeDtypeStruct(shape, dtype),
        ][: 1 + whole],
        scratch_types=work.scratch(dtype),
        interpret=interpret_params(interpret, groups),
        kernel_name="patch_embed",
        grid=(pl.cdiv(work.tiles, groups), work.outputs // work.width),
        grid_names=("block", "columns"),
        num_threads=groups,
        thread_name="warpgroup",
    )(images.reshape(work.lines, -1), weight, by_columns(table))
    return [x.reshape(work.batch, work.rows * work.columns, work.outputs) for x in out]

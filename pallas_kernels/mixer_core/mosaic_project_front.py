"""Compute in_proj, both causal convolutions, SiLU, the pooling and the skips of a mixer as one Mosaic GPU kernel.

    x, z = h W
    c_d  = silu(conv_d(x)),   d = forward, backward
    u_d  = mean of c_d over each line
    skip = (D_f c_f + D_b c_b)/2

The kernel writes z, the skips and the pooled tokens. It writes x only where a gradient will read it. A thread block
owns `COLUMNS` channels of x and as many of z for several images, one after another, so that its part of W stays in
shared memory. Two kinds of warpgroups work at the same time. The first kind multiplies tiles of `TILE` tokens by W. It
writes z to memory and x to shared memory, where an image lies in the order in which its tokens are stored. The second
kind convolves and pools the image before, and writes the skips. Lines may be rows or columns of the grid, since shared
memory can be read in any order.

Copies of swizzled tiles begin and end at multiples of eight rows of memory. So the tiles of an image cover the eights
that hold it, and may have tokens of its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.mosaic_common import convolve
from pallas_kernels.mixer_core.types import Lines
from pallas_kernels.mosaic import (
    PROCESSORS,
    SHARED_MEMORY,
    gpu_kernel,
    interpret_params,
    reduced,
    store,
    tiled,
)

TILE = 64  # tokens of a product, as many as one wgmma instruction takes
COLUMNS = 64  # channels of x of a thread block, and of z: one swizzled row of 128 bytes each
PART = 64  # inputs of in_proj that one copy brings: one swizzled row as well
PADDING = 8  # channels; keeps the rows of x in different banks
LINES = 4  # that a warpgroup pools at a time, one a warp
LONGEST = 32  # tokens of a line, because its convolutions are written out
IMAGES = 2  # in shared memory: one is written and one is pooled
MULTIPLIERS = 2  # warpgroups that multiply
CONVOLVERS = 1  # warpgroups that convolve
OVERHEAD = 2 * 1024  # bytes of shared memory for barriers, alignment and the driver


@dataclasses.dataclass(frozen=True)
class Work(Lines):
    """Describe one call: the grid of tokens, the widths, and how thread blocks share the work."""

    batch: int
    rows: int
    columns: int
    transposed: bool
    inputs: int
    width: int
    taps: int
    with_x: bool = False
    processors: int = PROCESSORS
    per_position: int = 1

    @property
    def size(self) -> int:
        """Tokens of an image."""
        return self.rows * self.columns

    @property
    def halo(self) -> int:
        return self.taps - 1

    @property
    def groups(self) -> int:
        """Groups of channels, each of other thread blocks."""
        return self.width // COLUMNS

    @property
    def blocks(self) -> int:
        """Thread blocks that share the images of one group of channels."""
        return max(1, min(self.batch, self.processors // self.groups))

    @property
    def parts(self) -> int:
        return self.inputs // PART

    @property
    def before(self) -> int:
        """The most rows between an image's first one and the last multiple of eight before it."""
        return 8 - math.gcd(self.size, 8)

    @property
    def tiles(self) -> int:
        """Products of an image, whose tiles begin at multiples of eight rows."""
        return pl.cdiv(self.before + self.size, TILE)

    @property
    def halves(self) -> int:
        """Results of the product that leave: x and z, or z."""
        return 2 if self.with_x else 1

    @property
    def slots(self) -> int:
        """Parts of tokens on their way to a multiplying warpgroup: those of two tiles if they fit, or of one."""
        fit = self._bytes(2 * self.parts) + OVERHEAD <= SHARED_MEMORY
        return 2 * self.parts if fit and not self.tiles % (2 * MULTIPLIERS) else self.parts

    @property
    def shared_memory(self) -> int:
        """Bytes of a thread block's tiles."""
        return self._bytes(self.slots)

    def _bytes(self, slots: int) -> int:
        weights = self.inputs * 2 * COLUMNS
        tokens = MULTIPLIERS * TILE * slots * PART
        results = MULTIPLIERS * TILE * self.halves * COLUMNS
        images = IMAGES * self.image_rows * (COLUMNS + PADDING)
        return 2 * (weights + tokens + results + images)

    def tiles_of(self, multiplier: int) -> range:
        """Return the tiles of a warpgroup: neighbours, because the last two of an image may have rows in common."""
        half = self.tiles // MULTIPLIERS
        return range(half, self.tiles) if multiplier else range(half)

    def old_rows(self, tile: int) -> list[int]:
        """List how many rows of a tile may belong to the image before or to the tile before."""
        begins = range(0, self.before + 1, math.gcd(self.size, 8))
        if tile < self.tiles - 1 or self.tiles == 1:
            return [0, 8] if self.before and tile == 0 else [0]
        ends = {pl.cdiv(begin + self.size, 8) * 8 for begin in begins}
        return sorted({self.tiles * TILE - end for end in ends} - {TILE})

    @property
    def image_rows(self) -> int:
        """Rows of an image's x in shared memory, a halo before it and whole lines included."""
        eights = pl.cdiv(self.before + self.size, 8) * 8
        return max(self.halo + eights, self.before + (self.lines + 1) * self.tokens)

    def unsupported(self) -> str | None:
        """Return why no thread block can do this work, or None."""
        if self.width % COLUMNS or self.inputs % PART:
            return f"{self.inputs} inputs and {self.width} channels are no multiples of {PART}"
        if self.batch * self.size % 8:
            return f"{self.batch} x {self.size} tokens are no multiple of 8"
        if self.tiles <= MULTIPLIERS:
            return f"{self.size} tokens are too few to share"
        if self.lines < LINES:
            return f"{self.lines} lines are fewer than {LINES}"
        if self.tokens < 2 * self.halo:
            return f"lines of {self.tokens} tokens are shorter than the convolutions' reach"
        if self.tokens > LONGEST:
            return f"lines of {self.tokens} tokens are longer than {LONGEST}"
        if self.shared_memory + OVERHEAD > SHARED_MEMORY:
            return (
                f"{self.size} tokens of {self.inputs} inputs do not fit shared memory beside "
                "in_proj's weight"
            )
        return None

    def scratch(self, dtype):
        """Return the shared memory and the barriers of a thread block."""
        transforms: Any = plgpu  # mypy takes them for abstract classes
        swizzled = (transforms.TilingTransform((8, PART)), transforms.SwizzleTransform(128))
        several = MULTIPLIERS
        return [
            plgpu.SMEM((self.parts, 2 * COLUMNS, PART), dtype, transforms=swizzled),  # W
            plgpu.SMEM((several, self.slots, TILE, PART), dtype, transforms=swizzled),  # tokens
            plgpu.SMEM((several, self.halves, TILE, COLUMNS), dtype, transforms=swizzled),  # x, z
            plgpu.SMEM((IMAGES, self.image_rows, COLUMNS + PADDING), dtype),  # x of images
            plgpu.Barrier(num_arrivals=2 * self.parts),  # W is there
            plgpu.Barrier(num_arrivals=1, num_barriers=several * self.slots),  # tokens are
            plgpu.Barrier(num_arrivals=several, num_barriers=IMAGES),  # an image is
            plgpu.Barrier(num_arrivals=CONVOLVERS, num_barriers=IMAGES),  # it is pooled
        ]


class Layouts:
    """Register layout of a token of each of four lines: a line a warp, two neighbouring channels a lane."""

    def __init__(self):
        base, self.tokens = tiled(((LINES, COLUMNS), (1, COLUMNS), (1, 2)), (-6,), (-3,), -1)
        self.channels = reduced(base, (0,))

    def over_lines(self, vector: jax.Array) -> jax.Array:
        """Repeat a vector of channels for all lines."""
        spread = lax.broadcast_in_dim(vector, (LINES, COLUMNS), (1,))
        return plgpu.layout_cast(spread, self.tokens)


@functools.partial(jax.jit, static_argnames=("work", "scale", "pooled_dtype", "interpret"))
def project_front(
    h, weight, kernels, biases, D, work: Work,
    *, scale: float, pooled_dtype: Any = jnp.float32, interpret: bool,
):  # fmt: skip
    """Project tokens, convolve, pool, and add up the skips.

    Args:
        h: ``b l d`` in half precision, in stored order.
        weight: of in_proj, transposed, ``2e d`` in h's dtype.
        kernels: ``2 k e`` float32: taps of the forward convolution, then of the backward one.
        biases, D: ``2 e`` float32.
        work: the sizes, and whether x is wanted.
        scale: factor of the mean.
        pooled_dtype: of the pooled tokens.
        interpret: run in Pallas' interpreter.

    Returns:
        z, ``b l e`` in h's dtype, or x and z in one array; the skips, ``b l e`` in h's dtype; and the pooled tokens
        of both directions, ``2 b lines e`` in `pooled_dtype`.
    """
    layouts = Layouts()
    parts, slots, halves, halo = work.parts, work.slots, work.halves, work.halo
    quads = pl.cdiv(work.lines, LINES)

    def body(h_ref, weight_ref, kernels_ref, biases_ref, D_ref, *refs):
        out_ref, skip_ref, pooled_ref, *scratch = refs
        w_tile, h_tile, out_tile, x_tile, w_barrier, h_barrier, full, free = scratch
        group, block = lax.axis_index("group"), lax.axis_index("block")
        warpgroup = lax.axis_index("warpgroup")
        channels = pl.ds(group * COLUMNS, COLUMNS)
        items = lax.div(work.batch - block + work.blocks - 1, work.blocks)

        def place(item):
            """Return an item's image, and the range of multiples of eight rows that holds it."""
            image = block + item * work.blocks
            end = lax.div(image * work.size + work.size + 7, 8) * 8
            return image, lax.div(image * work.size, 8) * 8, end

        def fetch_weight():
            for part in range(parts):
                for half in range(2):
                    plgpu.copy_gmem_to_smem(
                        weight_ref.at[
                            pl.ds(half * work.width + group * COLUMNS, COLUMNS),
                            pl.ds(part * PART, PART),
                        ],
                        w_tile.at[part, pl.ds(half * COLUMNS, COLUMNS)],
                        w_barrier,
                    )

        def multiply(here):
            """Fill one image after another in shared memory and in `out_ref`."""
            tiles = work.tiles_of(here)

            per_item = len(tiles) * parts

            def fetch(item, step):
                """Fetch a part if there is one; steps behind the last of an item are those of the next item."""
                if step >= per_item:
                    pl.when(item + 1 < items)(lambda: fetch(item + 1, step - per_item))
                    return
                tile, part = tiles[step // parts], step % parts
                _, begin, end = place(item)
                start = lax.min(begin + tile * TILE, end - TILE)
                plgpu.copy_gmem_to_smem(
                    h_ref.at[pl.ds(start, TILE), pl.ds(part * PART, PART)],
                    h_tile.at[here, step % slots],
                    h_barrier.at[here * slots + step % slots],
                )

            def product(item, tile, accumulator):
                for part in range(parts):
                    step = (tile - tiles[0]) * parts + part
                    plgpu.barrier_wait(h_barrier.at[here * slots + step % slots])
                    weights = w_tile.at[part].transpose((1, 0))
                    plgpu.wgmma(accumulator, h_tile.at[here, step % slots], weights)
                    if part and slots == parts:
                        plgpu.wgmma_wait(1)
                        plgpu.commit_smem()  # No warp reads the part before this one any more.
                        fetch(item, step - 1 + slots)
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()
                for unread in range(step if slots == parts else step + 1 - parts, step + 1):
                    fetch(item, unread + slots)
                return accumulator[...].astype(h.dtype)

            def tile_of(item, buffer, tile):
                image, begin, end = place(item)
                start = lax.min(begin + tile * TILE, end - TILE)
                xz = pl.run_scoped(
                    functools.partial(product, item, tile),
                    plgpu.ACC((TILE, 2 * COLUMNS), jnp.float32),
                )
                if tile == tiles[0]:
                    pl.when(item >= IMAGES)(lambda: plgpu.barrier_wait(free.at[buffer]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                x, z = xz[:, :COLUMNS], xz[:, COLUMNS:]
                for half, values in enumerate((x, z)[-halves:]):
                    out_tile[here, half] = values
                rows = pl.ds(halo + start - begin, TILE)
                store(x_tile.at[buffer, rows, pl.ds(0, COLUMNS)], x)
                plgpu.commit_smem()
                if tile == tiles[-1]:
                    plgpu.barrier_arrive(full.at[buffer])

                def write(old):
                    for half in range(halves):
                        plgpu.copy_smem_to_gmem(
                            out_tile.at[here, half, pl.ds(old, TILE - old)],
                            out_ref.at[
                                pl.ds(start + old, TILE - old),
                                pl.ds(half * work.width + group * COLUMNS, COLUMNS),
                            ],
                        )

                # Write every row once: eight rows that two images share with the first of them, rows that two tiles
                # share with the first tile.
                new = lax.max(begin + tile * TILE, lax.div(image * work.size + 7, 8) * 8)
                for old in work.old_rows(tile):
                    pl.when(new - start == old)(functools.partial(write, old))

            def item_of(item, _):
                for tile in tiles:
                    tile_of(item, lax.rem(item, IMAGES), tile)
                return ()

            if here == 0:
                fetch_weight()
            for step in range(slots):
                fetch(jnp.int32(0), step)
            plgpu.barrier_wait(w_barrier)
            lax.fori_loop(0, items, item_of, ())
            plgpu.wait_smem_to_gmem(0)
            if (
                interpret
            ):  # JAX 0.11's interpreter refuses an end at which nobody has seen the last arrivals.
                for buffer in range(IMAGES):
                    pl.when(buffer < items)(functools.partial(plgpu.barrier_wait, free.at[buffer]))

        def pool():
            """Convolve and pool one image after another, and write the skips."""
            here = warpgroup - MULTIPLIERS

            def vector(ref):
                halved = plgpu.load(ref, layout=layouts.channels, optimized=False) * 0.5
                return layouts.over_lines(halved)

            taps = [
                [vector(kernels_ref.at[d, j, channels]) for j in range(work.taps)] for d in range(2)
            ]
            bias = [vector(biases_ref.at[d, channels]) for d in range(2)]
            skips = [vector(D_ref.at[d, channels]) for d in range(2)]
            number = plgpu.broadcasted_iota(jnp.int32, (LINES, COLUMNS), 0, layout=layouts.tokens)
            zero = plgpu.layout_cast(
                jnp.broadcast_to(jnp.float32(0.0), (LINES, COLUMNS)), layouts.tokens
            )

            def strided(buffer, offset, first, at):
                """Load row `at` behind the beginning of each of the lines from `first` on."""
                if interpret:  # The interpreter does not know reshaped references.
                    rows = [offset + (first + i) * work.tokens + at for i in range(LINES)]
                    return jnp.stack([x_tile[buffer, row, pl.ds(0, COLUMNS)] for row in rows])
                image = x_tile.at[buffer, pl.ds(offset, (work.lines + 1) * work.tokens)]
                by_line = image.reshape(work.lines + 1, work.tokens, COLUMNS + PADDING)
                line, at = divmod(at, work.tokens)
                ref = by_line.at[pl.ds(first + line, LINES), at, pl.ds(0, COLUMNS)]
                return plgpu.load(ref, layout=layouts.tokens, optimized=False)

            def item_of(item, _):
                buffer = lax.rem(item, IMAGES)
                image, begin, _ = place(item)
                offset = image * work.size - begin
                plgpu.barrier_wait(full.at[buffer])

                def quad_of(index, _):
                    first = lax.min(index * LINES, work.lines - LINES)

                    def token(t):
                        """Load token t of each line; of the line before or after if there is none."""
                        if work.transposed:
                            lines_on, at = divmod(t, work.tokens)
                            row = offset + halo + at * work.columns + first + lines_on
                            ref = x_tile.at[buffer, pl.ds(row, LINES), pl.ds(0, COLUMNS)]
                            return plgpu.load(ref, layout=layouts.tokens, optimized=False)
                        return strided(buffer, offset, first, t + halo)

                    # All at once, because loads from shared memory do not pass the writes of the skips.
                    loaded = [token(t) for t in range(-halo, work.tokens + halo)]

                    def window(t):
                        """Return the tokens from `halo` before token t to `halo` behind it."""
                        values = []
                        for at in range(t - halo, t + halo + 1):
                            value = loaded[at + halo].astype(jnp.float32)
                            if at < 0:
                                value = jnp.where(number + first == 0, zero, value)
                            if at >= work.tokens:
                                value = jnp.where(number + first == work.lines - 1, zero, value)
                            values.append(value)
                        return values

                    sums = [zero, zero]
                    for at in range(work.tokens):
                        around = window(at)
                        halved = [convolve(around, taps[d], bias[d], bool(d)) for d in range(2)]
                        both = [lax.tanh(half) * half + half for half in halved]
                        sums = [old + c for old, c in zip(sums, both, strict=True)]
                        skip = (skips[0] * both[0] + skips[1] * both[1]).astype(h.dtype)
                        lines = pl.ds(first, LINES)
                        spot = (at, lines) if work.transposed else (lines, at)
                        store(skip_ref.at[image, *spot, channels], skip)
                    for d in range(2):
                        store(
                            pooled_ref.at[d, image, pl.ds(first, LINES), channels],
                            (sums[d] * (scale / work.tokens)).astype(pooled_dtype),
                        )
                    return ()

                # Neighbours, because the last two may have lines in common.
                begin, end = (lax.div((here + i) * quads, CONVOLVERS) for i in range(2))
                lax.fori_loop(begin, end, quad_of, ())
                plgpu.barrier_arrive(free.at[buffer])
                return ()

            lax.fori_loop(0, items, item_of, ())

        for here in range(MULTIPLIERS):
            pl.when(warpgroup == here)(functools.partial(multiply, here))
        pl.when(warpgroup >= MULTIPLIERS)(pool)

    out, skip, pooled = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((work.batch * work.size, halves * work.width), h.dtype),
            jax.ShapeDtypeStruct((work.batch, work.rows, work.columns, work.width), h.dtype),
            jax.ShapeDtypeStruct((2, work.batch, work.lines, work.width), pooled_dtype),
        ],
        scratch_types=work.scratch(h.dtype),
        interpret=interpret_params(interpret, MULTIPLIERS + CONVOLVERS),
        kernel_name="mixer_project_front",
        grid=(work.groups, work.blocks),
        grid_names=("group", "block"),
        num_threads=MULTIPLIERS + CONVOLVERS,
        thread_name="warpgroup",
    )(h.reshape(-1, work.inputs), weight, kernels, biases, D)
    by_image = lambda x: x.reshape(work.batch, work.size, -1)  # noqa: E731
    return by_image(out), by_image(skip), pooled

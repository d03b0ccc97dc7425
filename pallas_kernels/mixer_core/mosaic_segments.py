"""Work on a segment of a line in `mosaic_back.back_gradients`: copy it, compute s, and sum over the channels.

A warpgroup owns some channels, and its registers hold their parameters. On tokens of more than 384 channels up to four
warpgroups work side by side. They exchange only sums over their channels (`Sums`), in shared memory.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import Grid
from pallas_kernels.mixer_core.mosaic_common import (
    BLOCK,
    Sums,
    TokenLayouts,
    combined,
    convolve,
    owned_blocks,
    read_row,
    row_layout,
    silu,
)
from pallas_kernels.mosaic import store


def warpgroups(width: int, padding: int = 0, norm_kind: str = "layer") -> int:
    """Return how many warpgroups share the channels of a token.

    One up to 384 channels. One, too, if some channels count in no norm or the norm is no LayerNorm: nobody trains wide
    models of these kinds.
    """
    blocks = width // BLOCK
    if blocks <= 3 or padding or norm_kind != "layer":
        return 1
    return max(n for n in (1, 2, 3, 4) if blocks % n == 0 and blocks // n >= 2)


class Segments:
    """Copy segments in, compute s, and copy results out.

    All tiles have one part for each warpgroup. A warpgroup works on its own parts, which `mine` returns.
    """

    def __init__(self, grid: Grid, interpret: bool):
        self.grid, self.interpret = grid, interpret
        self.groups = warpgroups(grid.width, grid.padding, grid.norm_kind)
        self.all_blocks = grid.width // BLOCK
        self.blocks = self.all_blocks // self.groups  # of a warpgroup
        self.owned = owned_blocks(self.blocks)
        self.row = row_layout(self.owned, BLOCK)
        self.layouts = TokenLayouts(self.blocks, grid.padding, grid.norm_kind)
        at_once = self.layouts.at_once
        self.padded = pl.cdiv(grid.segment, at_once) * at_once
        self.whole = self.owned == self.blocks  # Then parameters are read only once.

    @property
    def items(self):
        """Number of segments of the thread block at work."""
        return self.grid.visits(lax.axis_index("group"))

    @property
    def threads(self) -> dict[str, Any]:
        """Arguments of `plgpu.kernel` that ask for the warpgroups."""
        return {"num_threads": self.groups, "thread_name": "warpgroup"} if self.groups > 1 else {}

    @property
    def group(self):
        """Number of the warpgroup at work."""
        return lax.axis_index("warpgroup") if self.groups > 1 else jnp.int32(0)

    def mine(self, *refs):
        """Return the warpgroup's own parts of tiles and barriers."""
        return [ref.at[self.group] for ref in refs]

    def channels(self, half: int = 0):
        """Return the warpgroup's own channel blocks in an array of all channels, or in its second half."""
        return pl.ds(half * self.all_blocks + self.group * self.blocks, self.blocks)

    def some(self, channels):
        """Return where some of the warpgroup's own channel blocks are in an array of all channels."""
        return pl.ds(self.group * self.blocks + channels.start, channels.size)

    def tile(self, dtype, rows: int | None = None):
        return plgpu.SMEM((self.groups, rows or self.padded, self.blocks, BLOCK), dtype)

    def barrier(self, num_arrivals: int):
        return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=self.groups)

    def exchange(self):
        """Return shared memory for the `Sums` of the tokens of two segments, and the barrier where warpgroups meet."""
        if self.groups == 1:
            return []
        shape = (2, len(Sums._fields), self.groups, self.padded)
        return [plgpu.SMEM(shape, jnp.float32), plgpu.Barrier(num_arrivals=self.groups)]

    def share(self, exchanged, item, of_rows):
        """Publish the `Sums` of a segment's tokens, and return a function of rows: the sums over all channels.

        One barrier per segment is enough, because there is shared memory for two segments. A warpgroup that overwrites
        the sums of a segment has passed the barrier of the next one, and all others had read the old sums before it.

        Args:
            exchanged: what `exchange` asked for.
            item: number of the segment.
            of_rows: function of rows that returns the sums over the warpgroup's own channels.

        Returns:
            A function of rows. It returns None if there is one warpgroup: then all channels are its own.
        """
        if self.groups == 1:
            return lambda rows: None
        tile, barrier = exchanged
        tile = tile.at[lax.rem(item, 2)]

        def publish(rows, _):
            for i, value in enumerate(of_rows(rows)):
                store(tile.at[i, self.group, rows], value)
            return ()

        self.each_token(publish)
        plgpu.commit_smem()
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        read = lambda ref: plgpu.load(ref, layout=self.layouts.statistic, optimized=False)  # noqa: E731

        def of_all(rows):
            count = tile.shape[0]
            return combined(
                [
                    Sums(*(read(tile.at[i, group, rows]) for i in range(count)))
                    for group in range(self.groups)
                ]
            )

        return of_all

    def halo_tile(self, dtype):
        return self.tile(dtype, self.grid.segment + 2 * self.grid.halo)

    def place(self, item):
        """Return the line and the first token of this thread block's segment number ``item``."""
        line, _, start = self.grid.place(lax.axis_index("group"), item)
        return line, start

    def pieces(self, ref, item, half: int):
        """List the pieces of the segment number ``item`` in global memory, and their rows in a tile."""
        line, start = self.place(item)
        batch, channels = lax.axis_index("batch"), self.channels(half)
        return [
            (self.grid.part(ref, batch, line, start + at, size, channels), pl.ds(at, size))
            for at, size in self.grid.pieces
        ]

    def fetch(self, ref, tile, barrier, item, half: int = 0):
        for part, rows in self.pieces(ref, item, half):
            plgpu.copy_gmem_to_smem(part, tile.at[rows], barrier)

    def fetch_with_halo(self, ref, tile, barrier, item):
        line, start = self.place(item)
        batch = lax.axis_index("batch")
        self.grid.fetch_with_halo(ref, tile, barrier, batch, line, start, self.channels())

    def send(self, tile, ref, item, half: int = 0):
        for part, rows in self.pieces(ref, item, half):
            plgpu.copy_smem_to_gmem(tile.at[rows], part)

    def each_group(self, run):
        """Call ``run(slice of channel blocks)`` for the warpgroup's own channel blocks, `owned` of them at a time."""

        def step(index, _):
            run(pl.ds(index * self.owned, self.owned))
            return ()

        if self.whole:
            step(0, ())
        else:
            lax.fori_loop(0, self.blocks // self.owned, step, ())

    def parameters(self, kernels, biases, D, channels):
        channels = self.some(channels)
        row = lambda ref: read_row(ref, self.row)  # noqa: E731
        kernel = [[row(kernels.at[d, j, channels]) for j in range(self.grid.taps)] for d in (0, 1)]
        return (
            kernel,
            [row(biases.at[d, channels]) for d in (0, 1)],
            [row(D.at[d, channels]) * 0.5 for d in (0, 1)],
        )

    def repeated(self, y, ids, item, channels):
        """Return a function of t: the mean of both scans' outputs, for the segment's token number t."""
        batch, channels = lax.axis_index("batch"), self.some(channels)
        line, start = self.place(item)
        per_position = self.grid.per_position

        def at(rows):
            sides = zip(y, rows, strict=True)
            first, second = (read_row(ref.at[batch, row, channels], self.row) for ref, row in sides)
            return (first + second) * 0.5

        if not ids:
            of_line = [at((line * per_position + k,) * 2) for k in range(per_position)]
            return lambda t: of_line[t % per_position]
        token = line * self.grid.tokens + start
        return lambda t: at([ref[batch, token + t] for ref in ids])

    def mix(self, x_tile, y, ids, item, s_tile, parameters):
        """Write s of the segment to ``s_tile``. ``parameters(channels)`` returns kernels, biases and D / 2."""
        grid = self.grid

        def run(channels):
            kernel, bias, skip = parameters(channels)
            repeated = self.repeated(y, ids, item, channels)
            window = [read_row(x_tile.at[j, channels], self.row) for j in range(2 * grid.halo)]
            for t in range(grid.segment):
                window.append(read_row(x_tile.at[t + 2 * grid.halo, channels], self.row))
                s = repeated(t)
                for d in (0, 1):
                    c = convolve(window, kernel[d], bias[d], bool(d))
                    s = s + skip[d] * silu(c, self.row, self.interpret, x_tile.dtype)
                store(s_tile.at[t, channels], s)
                window.pop(0)

        self.each_group(run)

    def vector(self, ref):
        return plgpu.load(ref.at[self.channels()], layout=self.layouts.channels, optimized=False)

    def tokens(self, ref):
        return plgpu.load(ref, layout=self.layouts.tokens, optimized=False).astype(jnp.float32)

    def each_token(self, run, carry=()):
        at_once = self.layouts.at_once
        step = lambda i, carry: run(pl.ds(i * at_once, at_once), carry)  # noqa: E731
        return lax.fori_loop(0, self.padded // at_once, step, carry)

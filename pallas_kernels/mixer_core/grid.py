"""Describe how the fused kernels cut a mixer's token grid: into lines, and lines into segments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.types import Lines


@dataclasses.dataclass(frozen=True)
class Grid(Lines):
    """A grid of tokens, stored row by row, and its division among blocks and tiles.

    A *line* is a row, or a column if ``transposed``; see `Lines`. The kernels visit one line after another. A *segment*
    is the part of a line that one tile in shared memory holds. Where segments do not divide a line, its last one
    overlaps the one before it, so that every tile is whole. Then the tokens of the overlap are computed twice, and must
    not be added twice.

    Attributes:
        batch: images.
        rows, columns: the grid's size, in positions.
        width: channels.
        transposed: whether lines are columns.
        taps: width of the causal convolution.
        segment: tokens of a segment, at most those of a line; a multiple of ``per_position``.
        per_block: segments that one GPU block visits. The front's blocks visit whole lines.
        per_position: tokens of a position. If ``transposed`` and more than 1, at least ``taps - 1``.
    """

    batch: int
    rows: int
    columns: int
    width: int
    transposed: bool
    taps: int
    segment: int
    per_block: int
    per_position: int = 1

    @property
    def halo(self) -> int:
        """Tokens on each side of a segment that the convolutions of its tokens read."""
        return self.taps - 1

    @property
    def segments(self) -> int:
        """Segments per line."""
        return math.ceil(self.tokens / self.segment)

    @property
    def overlaps(self) -> bool:
        """Whether the last segment of a line overlaps the one before it."""
        return self.tokens % self.segment != 0

    def start(self, part: Any) -> Any:
        """Return the first token of a line's segment number ``part``."""
        start = part * self.segment
        return jnp.minimum(start, self.tokens - self.segment) if self.overlaps else start

    def counts(self, part: Any, t: Any) -> Any:
        """Return whether token number ``t`` of a line's segment number ``part`` is counted in this segment.

        Where two segments overlap, only the last one counts the tokens. The halo behind the other one may reach past
        the line's end, where it holds zeros instead of the next line.
        """
        overlap = self.tokens - self.segment - part * self.segment
        return t < lax.select(part == self.segments - 1, jnp.int32(self.segment), overlap)

    @property
    def groups(self) -> int:
        """GPU blocks that share the lines of an image and a group of channels. The last may visit fewer segments."""
        return math.ceil(self.lines * self.segments / self.per_block)

    def visits(self, group: Any) -> Any:
        """Return the number of segments that GPU block number ``group`` visits."""
        count = self.lines * self.segments
        if count % self.per_block == 0:
            return self.per_block
        return jnp.minimum(self.per_block, count - group * self.per_block)

    def place(self, group: Any, item: Any) -> tuple[Any, Any, Any]:
        """Return a visited segment's line, its number in the line, and its first token."""
        number = group * self.per_block + item
        part = lax.rem(number, self.segments)
        return lax.div(number, self.segments), part, self.start(part)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """First token and size of the parts of a segment that lie in memory as `part` can slice them."""
        if not self.scattered:
            return [(0, self.segment)]
        return [(first, self.per_position) for first in range(0, self.segment, self.per_position)]

    @property
    def copies(self) -> int:
        """Copies of `fetch_with_halo`."""
        return len(self.pieces) + 2

    def part(self, ref: Any, batch: Any, line: Any, start: Any, size: int, channels: Any) -> Any:
        """Slice ``size`` tokens of a line, from token ``start``, out of ``ref``.

        ``ref`` is ``b rows (columns per_position) channels ...``. Of a scattered line, all must be of one position.
        """
        if self.scattered:
            position, first = lax.div(start, self.per_position), lax.rem(start, self.per_position)
            return ref.at[batch, position, pl.ds(line * self.per_position + first, size), channels]
        if self.transposed:
            return ref.at[batch, pl.ds(start, size), line, channels]
        return ref.at[batch, line, pl.ds(start, size), channels]

    def fetch_with_halo(self, ref, tile, barrier, batch, line, start, channels) -> None:
        """Copy the tokens before a segment, the segment in one or more pieces, and the tokens after it.

        The first token of an image has no neighbour before it, and the last has none after it. For these the copy asks
        for tokens past the end of a line, because the copy engine fills those with zeros. Asking for a line that does
        not exist would not work under `jax.vmap`: the engine addresses at most five dimensions, so Mosaic merges the
        mapped axis, batch and line, and the line after an image's last line is the first line of the next image. In a
        scattered grid it is the position that is merged, so there the copy asks for the line that does not exist.
        """
        h, t = self.halo, self.segment
        opens, closes = start == 0, start + t == self.tokens
        first, last = line == 0, line == self.lines - 1
        nothing, beginning = jnp.int32(self.tokens), jnp.int32(0)
        end_of_line, start_of_line = jnp.int32(self.tokens - h), beginning
        before_first, after_last = jnp.int32(self.lines), jnp.int32(self.lines)
        if not self.scattered:
            end_of_line = lax.select(first, nothing, end_of_line)
            start_of_line = lax.select(last, nothing, start_of_line)
            before_first = after_last = line
        before = lax.select(opens, lax.select(first, before_first, line - 1), line)
        after = lax.select(closes, lax.select(last, after_last, line + 1), line)
        copies = (
            (before, lax.select(opens, end_of_line, start - h), h, 0),
            *((line, start + at, size, h + at) for at, size in self.pieces),
            (after, lax.select(closes, start_of_line, start + t), h, h + t),
        )
        for at_line, at, size, row in copies:
            plgpu.copy_gmem_to_smem(
                self.part(ref, batch, at_line, at, size, channels),
                tile.at[pl.ds(row, size)],
                barrier,
                oob_mode=plgpu.OOBFillMode.ZEROS,
            )

    def send(self, tile, ref, batch, line, start, channels) -> None:
        """Copy a segment from shared memory to its place."""
        for at, size in self.pieces:
            plgpu.copy_smem_to_gmem(
                tile.at[pl.ds(at, size)], self.part(ref, batch, line, start + at, size, channels)
            )

    def wait_for_tile(self) -> None:
        """Wait until one of two tiles that segments are sent from in turn can be filled again."""
        if self.overlaps:  # Tokens of an overlap have to be written in order.
            plgpu.wait_smem_to_gmem(0)
        else:
            plgpu.wait_smem_to_gmem(len(self.pieces), wait_read_only=True)


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of ``n`` that is at most ``limit``."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def lines_per_block(lines: int, other_blocks: int, enough: int) -> int:
    """Return the largest number of lines per block that still makes at least ``enough`` blocks.

    Args:
        lines: lines of an image.
        other_blocks: blocks along the other axes (batch and channels).
        enough: blocks that keep the GPU busy.
    """
    wanted = max(1, math.floor(lines * other_blocks / enough))
    return largest_divisor(lines, wanted)

"""The token grid of a mixer as the fused kernels cut it: lines of tokens, lines in segments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Grid:
    """A ``rows × columns`` grid of tokens, stored row by row, and how a mixer visits it.

    lines: what is pooled, and visited one after another: the rows, or with
    ``transposed`` the columns; tokens: of a line; segment: tokens a tile holds;
    per_block: lines of one block; taps: width of the convolution.
    """

    batch: int
    rows: int
    columns: int
    width: int
    transposed: bool
    taps: int
    segment: int
    per_block: int

    @property
    def lines(self) -> int:
        return self.columns if self.transposed else self.rows

    @property
    def tokens(self) -> int:
        return self.rows if self.transposed else self.columns

    @property
    def halo(self) -> int:
        """Tokens before and after a segment that the convolutions reach."""
        return self.taps - 1

    @property
    def segments(self) -> int:
        """Segments of a line."""
        return self.tokens // self.segment

    @property
    def groups(self) -> int:
        """Blocks along the lines."""
        return self.lines // self.per_block

    def part(self, ref: Any, batch: Any, line: Any, start: Any, size: int, channels: Any) -> Any:
        """Neighbouring tokens of a line in an array ``b rows columns channels ...``."""
        if self.transposed:
            return ref.at[batch, pl.ds(start, size), line, channels]
        return ref.at[batch, line, pl.ds(start, size), channels]

    def fetch_with_halo(self, ref, tile, barrier, batch, line, start, channels) -> None:
        """Three copies: the tokens before a segment, itself, and those after it.

        Before the first and after the last token, the line asked for does not exist, and
        the copy engine fills in zeros.
        """
        h, t = self.halo, self.segment
        first = start == 0
        last = start + t == self.tokens
        before = lax.select(first, lax.select(line == 0, self.lines, line - 1), line)
        after = lax.select(last, line + 1, line)
        copies = (
            (before, lax.select(first, self.tokens - h, start - h), h, 0),
            (line, start, t, h),
            (after, lax.select(last, 0, start + t), h, h + t),
        )
        for at_line, at, size, row in copies:
            plgpu.copy_gmem_to_smem(
                self.part(ref, batch, at_line, at, size, channels),
                tile.at[pl.ds(row, size)],
                barrier,
                oob_mode=plgpu.OOBFillMode.ZEROS,
            )


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to limit."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def lines_per_block(lines: int, other_blocks: int, enough: int) -> int:
    """As many lines for a block as leave ``enough`` blocks."""
    wanted = max(1, math.floor(lines * other_blocks / enough))
    return largest_divisor(lines, wanted)

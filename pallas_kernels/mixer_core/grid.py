"""The token grid of a mixer as the fused kernels cut it: lines of tokens, lines in segments."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
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
        """Copy a segment with its neighbours, in three parts: the tokens before it, the segment, the tokens after it.

        Before the first token and after the last one of the image there is none. There the copy asks for tokens past
        the end of a line, because the copy engine fills in zeros for these. It would not always do so for a line that
        does not exist: it addresses at most five dimensions, so that under `jax.vmap` Mosaic joins the mapped axis,
        batch and line into one, and the line after an image's last is then the first one of the next image.
        """
        h, t = self.halo, self.segment
        opens, closes = start == 0, start + t == self.tokens
        first, last = line == 0, line == self.lines - 1
        nothing, beginning = jnp.int32(self.tokens), jnp.int32(0)
        end_of_line = lax.select(first, nothing, jnp.int32(self.tokens - h))
        start_of_line = lax.select(last, nothing, beginning)
        before = lax.select(opens, lax.select(first, line, line - 1), line)
        after = lax.select(closes, lax.select(last, line, line + 1), line)
        copies = (
            (before, lax.select(opens, end_of_line, start - h), h, 0),
            (line, start, t, h),
            (after, lax.select(closes, start_of_line, start + t), h, h + t),
        )
        for at_line, at, size, row in copies:
            plgpu.copy_gmem_to_smem(
                self.part(ref, batch, at_line, at, size, channels),
                tile.at[pl.ds(row, size)],
                barrier,
                oob_mode=plgpu.OOBFillMode.ZEROS,
            )


def largest_divisor(n: int, limit: int) -> int:
    """Find the largest divisor of n up to limit."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def lines_per_block(lines: int, other_blocks: int, enough: int) -> int:
    """Choose as many lines for a block as leave ``enough`` blocks."""
    wanted = max(1, math.floor(lines * other_blocks / enough))
    return largest_divisor(lines, wanted)

"""Share between the two kernels of a ragged grid's front: how tokens are cut into turns, and what a turn computes.

A thread owns one or two channels and walks the tokens in the order in which the mixer visits them. When the next token
is in another row, the thread writes the sum of the row that ends. The directions have rows of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mixer_core.grid import lines_per_block
from pallas_kernels.mixer_core.mosaic_common import CHANNELS, Convolutions

_BITS = 15  # of a row's number: both directions' rows fit one integer beside their flags
MOST_ROWS = 1 << _BITS
ENDS = (1 << 30, -(1 << 31))  # flags of `pack`, forward and backward


@dataclasses.dataclass(frozen=True)
class Runs:
    """Say how the tokens of a sample are cut among thread blocks and turns of a loop.

    Attributes:
        tokens: tokens of a thread block. They divide those of a sample.
        segment: tokens of a turn.
        channels: of a thread block; a thread owns one or two.
    """

    tokens: int
    segment: int
    channels: int

    @property
    def segments(self) -> int:
        """Turns of a thread block."""
        return math.ceil(self.tokens / self.segment)

    @property
    def whole(self) -> bool:
        """Whether the last turn is a whole one."""
        return self.tokens % self.segment == 0


def cut(batch: int, length: int, width: int, enough: int) -> Runs:
    """Choose runs that make `enough` thread blocks, and segments of 4 to 8 tokens of which few are past a run's end."""
    channels = 2 * CHANNELS if width % (2 * CHANNELS) == 0 else CHANNELS
    tokens = lines_per_block(length, batch * width // channels, enough)
    segment = min(range(4, 9), key=lambda n: (math.ceil(tokens / n) * n, -n))
    return Runs(tokens, min(segment, tokens), channels)


def pack(ids, runs: Runs) -> jax.Array:
    """Pack each token's rows of both directions, and whether the token is the last of its row in its run."""
    last = (jnp.arange(ids[0].shape[1]) + 1) % runs.tokens == 0
    packed = jnp.zeros_like(ids[0])
    for d, of_row in enumerate(ids):
        following = jnp.concatenate([of_row[:, 1:], of_row[:, -1:]], axis=1)
        ends = jnp.logical_or(of_row != following, last)
        packed = packed | (of_row << (_BITS * d)) | jnp.where(ends, jnp.int32(ENDS[d]), 0)
    return packed


def take_turn(
    start: jax.Array,
    values: list[jax.Array],
    window: list[jax.Array],
    sums: list[jax.Array],
    runs: Runs,
    convolutions: Convolutions,
    step_of: Callable[[int], jax.Array],
    write_skip: Callable[[int, jax.Array], None],
    write_row: Callable[[int, jax.Array, jax.Array], None],
) -> None:
    """Visit the tokens of a turn: write their skips, and the sums of the rows that end.

    Args:
        start: index of the turn's first token in its run.
        values: the tokens that enter the window, one for each token of the turn.
        window: tokens that the convolutions see, float32, without the last; moved on in place.
        sums: sums of both directions' rows that have not ended; updated in place.
        runs: how the tokens are cut.
        convolutions: of the thread's channels.
        step_of: function of a token of the turn that returns what `pack` made of it.
        write_skip: function (token of the turn, skip).
        write_row: function (direction, row, sum over the row's tokens).
    """
    for t, value in enumerate(values):
        window.append(value.astype(jnp.float32))
        both = convolutions.of(window)
        skip = convolutions.skip(both)
        write = lambda t=t, skip=skip: write_skip(t, skip)  # noqa: E731
        exists = None if runs.whole else start + t < runs.tokens
        if exists is None:
            write()
        else:
            pl.when(exists)(write)
        step = step_of(t)
        for d, c in enumerate(both):
            ends = (step & ENDS[d]) != 0
            if exists is not None:
                ends = jnp.logical_and(ends, exists)
            row = (step >> (_BITS * d)) & (MOST_ROWS - 1)
            sums[d] = sums[d] + c

            @pl.when(ends)
            def _(d=d, row=row, total=sums[d]):
                write_row(d, row, total)

            sums[d] = jnp.where(ends, 0.0, sums[d])
        window.pop(0)

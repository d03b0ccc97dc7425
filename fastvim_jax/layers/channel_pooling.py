"""Pooling of a token grid with a third axis, the channels: FastChannelVim (section 3.3, Tables 20 and 21).

Tokens are stored channel-first (row, column, channel: the channel changes fastest) or spatial-first (channel, row,
column). A block visits the axes in one order and pools over one axis, or over two that are next to each other in that
order. So in scan order the sequence is always `before · members · after`, with one scan step for each
(before, after): members are the tokens that are pooled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling, max_by_argmax
from fastvim_jax.typing import Inner, Pooled, Scores
from pallas_kernels.dtypes import wide_dtype

ScanOrder = Literal["channel", "spatial"]
ChannelPoolAxes = Literal["alternate", "columns", "rows", "two_axes"]


class ChannelLines(NamedTuple):
    """Describe a channel grid as the fused kernels see it: lines of positions that hold several tokens each.

    The kernels pool the tokens number k of all positions of a line to one token. See `mixer_core`.

    Attributes:
        rows, columns: the grid of positions.
        transposed: whether a line is a column.
        per_position: tokens of a position.
        reorder: whether the tokens must be brought into scan order first.
        rest: what is left to pool to one step: the pooled tokens of a line ("line"), those of the same number in all
            lines ("number"), or None.
    """

    rows: int
    columns: int
    transposed: bool
    per_position: int
    reorder: bool
    rest: Literal["line", "number"] | None = None

    @property
    def lines(self) -> int:
        return self.columns if self.transposed else self.rows


@dataclass(frozen=True)
class ChannelPooling:
    """Pool a three-axis grid over a run of axes.

    Args:
        shape: Lengths of the three stored axes.
        order: The stored axes in the order in which tokens are visited, slowest first.
        first: Place in `order` of the first pooled axis.
        count: Number of pooled axes, 1 or 2.
        method: "mean", "max" or "attention" (softmax of `scores` over the pooled tokens).
        scale: Factor on the pooled mean.
    """

    shape: tuple[int, int, int]
    order: tuple[int, int, int]
    first: int
    count: int = 1
    method: str = "mean"
    scale: float = 1.0

    @property
    def every_token(self) -> bool:
        """Whether every token is a step of the scan."""
        return False

    @property
    def view(self) -> tuple[int, int, int]:
        """Lengths (before, members, after) of the sequence in scan order."""
        lengths = [self.shape[axis] for axis in self.order]
        stop = self.first + self.count
        parts = (lengths[: self.first], lengths[self.first : stop], lengths[stop:])
        before, members, after = (math.prod(part) for part in parts)
        return before, members, after

    @property
    def contiguous(self) -> bool:
        """Whether pooled tokens follow each other in scan order, as the rows of a grid do."""
        return self.view[2] == 1

    def lines(self, conv_width: int) -> ChannelLines:
        """Return the grid of lines that the kernels of a mixer with this convolution pool."""
        before, members, after = self.view
        rows, columns, channels = self.shape
        if self.first == 0 and self.count == 2:
            before, members = (self.shape[axis] for axis in self.order[:2])
            return ChannelLines(
                before, members, False, after, reorder=self.order != (0, 1, 2), rest="number"
            )
        # The kernels read columns in place where a position holds all that the convolution reads beside a segment.
        in_place = self.order == (1, 0, 2) and (channels == 1 or channels >= conv_width - 1)
        if in_place and self.count == 1:
            return ChannelLines(rows, columns, True, channels, reorder=False)
        if in_place and self.method == "mean":
            return ChannelLines(rows, columns, True, channels, reorder=False, rest="line")
        return ChannelLines(before, members, False, after, reorder=self.order != (0, 1, 2))

    @property
    def scan_length(self) -> int:
        before, _, after = self.view
        return before * after

    def to_scan_order(self, x: Inner) -> Inner:
        return self._permute(x, self.shape, self.order)

    def from_scan_order(self, y: Inner) -> Inner:
        visited = tuple(self.shape[axis] for axis in self.order)
        back = tuple(self.order.index(axis) for axis in range(3))
        return self._permute(y, visited, back)

    def pool(self, x: Inner, scores: Scores | None = None, *, reverse: bool = False) -> Pooled:
        wide = wide_dtype(x.dtype)
        grid = x.reshape(x.shape[0], *self.view, x.shape[-1])
        if self.method == "mean":
            pooled = jnp.mean(grid, axis=2, dtype=wide) * self.scale
        elif self.method == "max":
            pooled = max_by_argmax(grid, axis=2)
        else:
            assert scores is not None, "attention pooling reads scores"
            weights = jax.nn.softmax(scores.astype(wide).reshape(*grid.shape[:4], 1), axis=2)
            pooled = jnp.sum(weights * grid, axis=2)
        return pooled.astype(wide).reshape(x.shape[0], -1, x.shape[-1])

    def unpool(self, y: Pooled, *, reverse: bool = False) -> Inner:
        before, members, after = self.view
        steps = y.reshape(y.shape[0], before, 1, after, y.shape[-1])
        tokens = jnp.broadcast_to(steps, (y.shape[0], before, members, after, y.shape[-1]))
        return tokens.reshape(y.shape[0], -1, y.shape[-1])

    def _permute(self, x: Inner, shape: tuple[int, ...], order: tuple[int, ...]) -> Inner:
        if order == (0, 1, 2):
            return x
        grid = x.reshape(x.shape[0], *shape, x.shape[-1])
        return grid.transpose(0, *(axis + 1 for axis in order), 4).reshape(x.shape)


def channel_poolings(
    grid: tuple[int, int],
    channels: int,
    *,
    scan_order: ScanOrder,
    pool_axes: ChannelPoolAxes,
    method: str,
    scale: float = 1.0,
    class_token: bool = False,
) -> tuple[Pooling, ...]:
    """List one period of poolings over `rows columns` of `grid` and `channels`.

    alternate: pool over the columns, then on the transposed grid over the rows. two_axes (channel-first only): columns
    and channels; rows and channels on the transposed grid; rows and columns. Where the grid reduces to rows of tokens
    in stored order, the pooling is a `GridPooling`, which the fused kernels know.
    """
    rows, columns = grid
    if method == "none":
        return (NoPooling(rows * columns * channels + class_token),)
    first_row = 0 if scan_order == "channel" else 1  # Place of the rows' axis in storage.
    shape = (rows, columns, channels) if scan_order == "channel" else (channels, rows, columns)
    stored = (0, 1, 2)
    transposed = (1, 0, 2) if scan_order == "channel" else (0, 2, 1)
    over_columns = (stored, first_row + 1, 1)
    over_rows = (transposed, first_row + 1, 1)
    periods = {
        "alternate": (over_columns, over_rows),
        "columns": (over_columns,),
        "rows": (over_rows,),
        "two_axes": ((stored, 1, 2), (transposed, 1, 2), (stored, 0, 2)),
    }
    poolings = [
        ChannelPooling(shape, order, first, count, method, scale)
        for order, first, count in periods[pool_axes]
    ]
    return tuple(_as_grid(pooling) for pooling in poolings)


def _as_grid(pooling: ChannelPooling) -> Pooling:
    """Return the equal `GridPooling` if tokens are visited as they are stored and lines are contiguous."""
    if pooling.order != (0, 1, 2) or not pooling.contiguous:
        return pooling
    before, members, _ = pooling.view
    return GridPooling(before, members, method=pooling.method, scale=pooling.scale)

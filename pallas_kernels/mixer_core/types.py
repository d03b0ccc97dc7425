"""Types that pass between the mixer core's public function and its implementations."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

RowIds = tuple[Int[Array, "b l"], ...]  # the arrays of a ragged grid's `Visit`, else ()


class Visit(NamedTuple):
    """Say in which row of a ragged grid each token is, and in which order the tokens are visited.

    Attributes:
        forward, backward: row of each visited token, for either direction, never decreasing.
        places: index of each visited token among the stored ones; None if both orders are the same.
        inverse: index of each stored token among the visited ones.
        stored_forward, stored_backward: row of each stored token, if the orders differ.
    """

    forward: Int[Array, "b l"]
    backward: Int[Array, "b l"]
    places: Int[Array, "b l"] | None = None
    inverse: Int[Array, "b l"] | None = None
    stored_forward: Int[Array, "b l"] | None = None
    stored_backward: Int[Array, "b l"] | None = None

    @property
    def rows(self) -> RowIds:
        """Rows of the visited tokens."""
        return self.forward, self.backward

    @property
    def stored_rows(self) -> RowIds:
        """Rows of the stored tokens."""
        if self.stored_forward is None or self.stored_backward is None:
            return self.rows
        return self.stored_forward, self.stored_backward


class Directions(NamedTuple):
    """Parameters of both directions, forward then backward: convolutions and skips."""

    kernels: Float[Array, "2 k e"]
    biases: Float[Array, "2 e"]
    D: Float[Array, "2 e"]


NORM_KINDS = ("layer", "rms", "none")


class Norm(NamedTuple):
    """Parameters of the norm behind the scans. An RMSNorm adds the shift as well; without a norm neither is read."""

    scale: Float[Array, " e"]
    shift: Float[Array, " e"]


class Lines:
    """Describe the lines of a grid of tokens: a line is a row or, if transposed, a column.

    Each position of the grid holds `per_position` tokens next to each other, for instance one for each channel of a
    patch. A line is pooled to `per_position` tokens. The k-th of them is pooled from the k-th token of each position.
    """

    rows: int
    columns: int
    transposed: bool
    per_position: int

    @property
    def lines(self) -> int:
        """Number of lines."""
        return self.columns if self.transposed else self.rows

    @property
    def positions(self) -> int:
        """Number of positions of a line."""
        return self.rows if self.transposed else self.columns

    @property
    def tokens(self) -> int:
        """Number of tokens of a line."""
        return self.positions * self.per_position

    @property
    def steps(self) -> int:
        """Number of pooled tokens, one scan step each."""
        return self.lines * self.per_position

    @property
    def scattered(self) -> bool:
        """Whether a line's positions lie apart in memory, and each holds several tokens."""
        return self.transposed and self.per_position > 1


@dataclasses.dataclass(frozen=True)
class CoreOptions(Lines):
    """The arguments of `api.mixer_core` that are not arrays. For a ragged grid, rows and columns of the whole one."""

    rows: int
    columns: int
    transposed: bool
    scale: float
    eps: float
    method: str = "mean"
    padding: int = 0  # channels at the end of x and of z that are zeros and count in no norm
    norm_kind: str = "layer"
    per_position: int = 1
    pooled_dtype: Any = None  # of the pooled tokens of a whole grid; None for float32 or wider

"""Types that pass between the mixer core's public function and its implementations."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int

RowIds = (
    tuple[Int[Array, "b l"], Int[Array, "b l"]] | tuple[()]
)  # of a ragged grid's tokens, else ()


class Directions(NamedTuple):
    """Parameters of both directions, forward then backward: convolutions and skips."""

    kernels: Float[Array, "2 k e"]
    biases: Float[Array, "2 e"]
    D: Float[Array, "2 e"]


NORM_KINDS = ("layer", "rms", "none")


class Norm(NamedTuple):
    """Parameters of the norm. An RMSNorm adds the shift, too; without a norm neither is read."""

    scale: Float[Array, " e"]
    shift: Float[Array, " e"]


class Lines:
    """Describe the lines of a grid of tokens: what is pooled to one token, a row or, if transposed, a column."""

    rows: int
    columns: int
    transposed: bool

    @property
    def lines(self) -> int:
        """Number of lines. Each is pooled to one scan step."""
        return self.columns if self.transposed else self.rows

    @property
    def tokens(self) -> int:
        """Number of tokens of a line."""
        return self.rows if self.transposed else self.columns


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

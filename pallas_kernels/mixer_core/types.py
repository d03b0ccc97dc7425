"""What passes between the mixer core's public function and its implementations."""

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


class Norm(NamedTuple):
    """Parameters of the LayerNorm."""

    scale: Float[Array, " e"]
    shift: Float[Array, " e"]


@dataclasses.dataclass(frozen=True)
class CoreOptions:
    """The static half of a call: see `api.mixer_core`. Of a ragged grid, rows and columns are the whole one's."""

    rows: int
    columns: int
    transposed: bool
    scale: float
    eps: float
    method: str = "mean"

    @property
    def lines(self) -> int:
        """What is pooled, one scan step each."""
        return self.columns if self.transposed else self.rows

    @property
    def tokens(self) -> int:
        """Tokens of a line."""
        return self.rows if self.transposed else self.columns

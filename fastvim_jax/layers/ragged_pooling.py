"""Pool rows of a grid in which tokens are missing, other ones in every image (FastMaskVim).

Each row of the grid is one step of the scan. It reads the sum of the row's tokens divided by the number of columns of
the whole grid, or divided by the number of the row's tokens, or their maximum. A row without tokens reads zero. An
array says which token is in which row, so masks may differ between images and calls of one compiled program.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fastvim_jax.layers.masking import transpose_ids
from fastvim_jax.typing import Inner, Pooled, Scores
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.moves import move_tokens


@dataclass(frozen=True, eq=False)
class RaggedPooling:
    """Pool to one step per row of a grid of which an image has only some tokens. Build it with `ragged_pooling`.

    Args:
        rows, columns: The whole grid in scan order.
        row_ids: Row of every token in scan order, for the forward direction, `b l`.
        reverse_ids: Row of every token in scan order, for the backward direction, `b l`; see `reversal` of
            `ragged_pooling`.
        order: Stored place of the token at each place of the scan order, `b l`; None: both orders are the same.
        inverse: The inverse permutation of `order`.
        valid: False at padded places in scan order, `b l`; None: no place is padded.
        method: "mean", "max", or "none": every token is a step (Vim with padding).
        divisor: "row_length" divides a row's sum by `columns`, "count" by its number of tokens plus 1e-6.
        scale: Factor on the pooled mean.
    """

    rows: int
    columns: int
    row_ids: Int[Array, "b l"]
    reverse_ids: Int[Array, "b l"]
    order: Int[Array, "b l"] | None = None
    inverse: Int[Array, "b l"] | None = None
    valid: Bool[Array, "b l"] | None = None
    method: str = "mean"
    divisor: str = "row_length"
    scale: float = 1.0

    @property
    def scan_length(self) -> int:
        return self.row_ids.shape[1] if self.method == "none" else self.rows

    @property
    def every_token(self) -> bool:
        return False  # Padding must be set to zero even if nothing is pooled.

    def to_scan_order(self, x: Inner) -> Inner:
        if self.order is not None and self.inverse is not None:
            x = move_tokens(x, self.order, self.inverse)
        # Padding becomes zero, so that a convolution sees it like the outside of the sequence.
        return x if self.valid is None else jnp.where(self.valid[:, :, None], x, 0)

    def from_scan_order(self, y: Inner) -> Inner:
        if self.order is None or self.inverse is None:
            return y
        return move_tokens(y, self.inverse, self.order)

    def as_stored(self) -> RaggedPooling:
        """Return the pooling of tokens that are in scan order already."""
        return dataclasses.replace(self, order=None, inverse=None)

    def pool(self, x: Inner, scores: Scores | None = None, *, reverse: bool = False) -> Pooled:
        wide = wide_dtype(x.dtype)
        if self.method == "none":
            return x if self.valid is None else jnp.where(self.valid[:, :, None], x, 0)
        member = self._members(reverse)
        if self.method == "max":
            return _largest(x, member).astype(wide)
        # A matrix product, because scatter-adds round differently from run to run on GPUs.
        sums = jnp.einsum(
            "bsl,ble->bse", member.astype(x.dtype), x,
            precision="highest", preferred_element_type=wide,
        )  # fmt: skip
        if self.divisor == "count":
            return sums / (member.sum(axis=2, dtype=wide)[:, :, None] + 1e-6) * self.scale
        return sums * (self.scale / self.columns)

    def unpool(self, y: Pooled, *, reverse: bool = False) -> Inner:
        if self.method == "none":
            return y
        ids = self.reverse_ids if reverse else self.row_ids
        member = ids[:, :, None] == jnp.arange(self.rows)
        return jnp.einsum("bls,bse->ble", member.astype(y.dtype), y, precision="highest")

    def _members(self, reverse: bool) -> Bool[Array, "b s l"]:
        """Say which tokens are in which row."""
        ids = self.reverse_ids if reverse else self.row_ids
        member = ids[:, None, :] == jnp.arange(self.rows)[:, None]
        return member if self.valid is None else member & self.valid[:, None, :]


def ragged_pooling(
    ids: Int[Array, "b l"],
    grid: tuple[int, int],
    *,
    transposed: bool = False,
    reversal: str = "released",
    counts: Int[Array, " b"] | None = None,
    method: str = "mean",
    divisor: str = "row_length",
    scale: float = 1.0,
) -> RaggedPooling:
    """Build the pooling of one block over the tokens at the positions `ids`.

    Args:
        ids: Positions in the row-major grid, ascending in every image (padded places last).
        grid: Rows and columns of the whole grid.
        transposed: Visit the tokens column by column and pool along the rows' axis (every other block).
        reversal: "released": the backward direction reverses the tokens and not their rows, as the released weights
            were trained, so that it mixes tokens of different rows; "consistent": each token keeps its own row.
        counts: Number of tokens of each image; its other places are padding. None: all places are tokens.
        method, divisor, scale: See `RaggedPooling`.
    """
    rows, columns = grid
    places = jnp.arange(ids.shape[1])
    valid = None if counts is None else places < counts[:, None]
    order = inverse = None
    if transposed:
        ids = transpose_ids(ids, rows, columns)
        rows, columns = columns, rows
        key = ids if valid is None else jnp.where(valid, ids, rows * columns)
        order = jnp.argsort(key, axis=1, stable=True)  # padding stays last
        inverse = jnp.argsort(order, axis=1)
        ids = jnp.take_along_axis(ids, order, axis=1)
    row_ids = ids // columns
    if reversal == "consistent":
        reverse_ids = row_ids
    elif counts is None:
        reverse_ids = rows - 1 - row_ids[:, ::-1]
    else:
        assert valid is not None
        partner = jnp.where(valid, counts[:, None] - 1 - places, places)
        reverse_ids = rows - 1 - jnp.take_along_axis(row_ids, partner, axis=1)
    return RaggedPooling(
        rows, columns, row_ids, reverse_ids, order, inverse, valid, method, divisor, scale
    )


def _largest(x: Inner, member: Bool[Array, "b s l"]) -> Pooled:
    """Return every row's maximum, 0 for an empty row. The gradient goes to the first token that attains it."""
    candidates = jnp.where(member[..., None], x[:, None], -jnp.inf)
    place = jnp.argmax(candidates, axis=2)
    return jnp.where(member.any(axis=2)[..., None], jnp.take_along_axis(x, place, axis=1), 0)

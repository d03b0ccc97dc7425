"""Pool tokens for the scan: decide which tokens the scan reads, in which order, and how its results reach the tokens.

A mixer works with any object that follows the `Pooling` protocol. A new variant of the family is therefore a new
pooling, not a new mixer. The whole model stores tokens in one order (*stored order*); a pooling says in which order
the mixer visits them (*scan order*).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from fastvim_jax.typing import Inner, Pooled, Scores
from pallas_kernels.dtypes import wide_dtype


@runtime_checkable
class Pooling(Protocol):
    """What a mixer needs to know about the token grid of its block.

    A pooling may hold arrays, also traced ones, such as the row ids of a ragged grid. It need not be a pytree, because
    blocks close over it. A stack of blocks repeats a short list of poolings (a *period*, for instance columns, rows).
    The pooling of a block depends on its place in the period and on nothing else, because `lax.scan` compiles one
    period for all blocks.

    The backward direction, which visits the tokens from last to first, passes `reverse=True`. Arrays are not flipped
    for it. A pooling that treats both directions alike ignores the argument.
    """

    @property
    def scan_length(self) -> int:
        """Number of steps of the scan (`s`)."""
        ...

    @property
    def every_token(self) -> bool:
        """Whether every token is one step of the scan, so that `pool` and `unpool` return their inputs unchanged."""
        ...

    def to_scan_order(self, x: Inner) -> Inner:
        """Bring tokens from stored order into the order in which convolution and scan visit them."""
        ...

    def from_scan_order(self, y: Inner) -> Inner:
        """Undo `to_scan_order`."""
        ...

    def pool(self, x: Inner, scores: Scores | None = None, *, reverse: bool = False) -> Pooled:
        """Pool tokens, in scan order, to the steps of the scan.

        The result is float32 or wider, unless every token is a step: then it is x.

        Args:
            x: tokens after the convolution, `b l e`.
            scores: one score per token `b l 1`; only attention pooling reads them.
            reverse: whether the backward direction asks.
        """
        ...

    def unpool(self, y: Pooled, *, reverse: bool = False) -> Inner:
        """Give each token, in scan order, the scan's output at its step."""
        ...


@dataclass(frozen=True)
class NoPooling:
    """Vim: every token is a step of the scan.

    Args:
        tokens: Number of tokens.
        padding: How many of them, at the end, attention ignores as keys. Scans know no padding.
    """

    tokens: int
    padding: int = 0

    @property
    def scan_length(self) -> int:
        return self.tokens

    @property
    def every_token(self) -> bool:
        return True

    def to_scan_order(self, x: Inner) -> Inner:
        return x

    def from_scan_order(self, y: Inner) -> Inner:
        return y

    def pool(self, x: Inner, scores: Scores | None = None, *, reverse: bool = False) -> Pooled:
        return x

    def unpool(self, y: Pooled, *, reverse: bool = False) -> Inner:
        return y


@dataclass(frozen=True)
class GridPooling:
    """FastVim: every row of the grid is one step of the scan; with `transposed`, every column is.

    Args:
        rows, columns: The *stored* grid: token i lies at (i // columns, i % columns).
        transposed: Visit the tokens column by column and pool along the rows' axis (every other block).
        method: "mean", "max", "attention" (weights: softmax of `scores` over the pooled tokens), or "none": visit the
            tokens in this order, but do not pool them.
        scale: Factor on the pooled mean. After masked pre-training of ratio 0.75 it is 0.25, because the means seen
            there were sums over the visible quarter of a row, divided by the length of the whole row.
        class_index: Index of the class token in the sequence, or None. The class token is one step of the scan and is
            never pooled. Transposing the grid leaves it at this index. If the index lies inside a row, the class
            token's step comes just before the step of that row.
    """

    rows: int
    columns: int
    transposed: bool = False
    method: str = "mean"
    scale: float = 1.0
    class_index: int | None = None

    @property
    def scan_rows(self) -> int:
        """Rows of the grid in scan order."""
        return self.columns if self.transposed else self.rows

    @property
    def scan_columns(self) -> int:
        """Tokens pooled into one step."""
        return self.rows if self.transposed else self.columns

    @property
    def scan_length(self) -> int:
        if self.method == "none":
            return self.rows * self.columns + (self.class_index is not None)
        return self.scan_rows + (self.class_index is not None)

    @property
    def every_token(self) -> bool:
        return self.method == "none"

    @property
    def class_step(self) -> int | None:
        """Index of the class token among the steps of the scan, or None."""
        return None if self.class_index is None else self.class_index // self.scan_columns

    def to_scan_order(self, x: Inner) -> Inner:
        return self._transpose(x, self.rows, self.columns)

    def from_scan_order(self, y: Inner) -> Inner:
        return self._transpose(y, self.columns, self.rows)

    def pool(self, x: Inner, scores: Scores | None = None, *, reverse: bool = False) -> Pooled:
        if self.method == "none":
            return x
        wide = wide_dtype(x.dtype)
        x, class_token = _take_out(x, self.class_index)
        grid = x.reshape(x.shape[0], self.scan_rows, self.scan_columns, x.shape[-1])
        if self.method == "mean":
            pooled = jnp.mean(grid, axis=2, dtype=wide) * self.scale
        elif self.method == "max":
            pooled = max_by_argmax(grid, axis=2)
        else:
            assert scores is not None, "attention pooling reads scores"
            scores, _ = _take_out(scores, self.class_index)
            weights = jax.nn.softmax(scores.astype(wide).reshape(*grid.shape[:3], 1), axis=2)
            pooled = jnp.sum(weights * grid.astype(wide), axis=2)
        return _put_in(pooled.astype(wide), class_token, self.class_step)

    def unpool(self, y: Pooled, *, reverse: bool = False) -> Inner:
        if self.method == "none":
            return y
        y, class_token = _take_out(y, self.class_step)
        shape = (y.shape[0], self.scan_rows, self.scan_columns, y.shape[-1])
        tokens = jnp.broadcast_to(y[:, :, None, :], shape)
        return _put_in(jax.lax.collapse(tokens, 1, 3), class_token, self.class_index)

    def _transpose(self, x: Inner, rows: int, columns: int) -> Inner:
        if not self.transposed:
            return x
        x, class_token = _take_out(x, self.class_index)
        grid = x.reshape(x.shape[0], rows, columns, x.shape[-1]).swapaxes(1, 2)
        return _put_in(grid.reshape(x.shape), class_token, self.class_index)


def max_by_argmax(x: jax.Array, axis: int) -> jax.Array:
    """Compute the maximum along `axis`; the gradient goes to the first entry that attains the maximum.

    The gradient of `jnp.max` compares all entries with the maximum and divides by the number of equal ones. XLA may
    recompute the entries with other rounding. Then no entry equals the maximum, and that gradient is NaN.
    """
    where = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    chosen = where == jnp.argmax(x, axis=axis, keepdims=True)
    return jnp.sum(jnp.where(chosen, x, 0), axis=axis)


def _take_out(x: jax.Array, index: int | None) -> tuple[jax.Array, jax.Array | None]:
    if index is None:
        return x, None
    rest = jnp.concatenate([x[:, :index], x[:, index + 1 :]], axis=1)
    return rest, x[:, index : index + 1]


def _put_in(x: jax.Array, token: jax.Array | None, index: int | None) -> jax.Array:
    if token is None:
        return x
    return jnp.concatenate([x[:, :index], token.astype(x.dtype), x[:, index:]], axis=1)

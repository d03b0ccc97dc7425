"""Pooling strategies: which tokens the scan sees, in which order, and how its result is handed back.

A mixer works on any object with this protocol, so a new variant of the family is a new pooling and not a new
mixer. Tokens are stored in one order throughout the model; a pooling says in which order the mixer scans them.
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

    A pooling may hold arrays, traced ones too (row ids of a ragged grid). Blocks close over it, so it need not be a
    pytree, and it may not change between blocks of one `lax.scan` other than by its place in the period. Methods
    get `reverse=True` from the direction that visits the tokens from last to first; arrays keep the stored order
    then too, and a pooling that treats both directions alike ignores it.
    """

    @property
    def scan_length(self) -> int:
        """Number of steps of the scan (`s`)."""
        ...

    @property
    def every_token(self) -> bool:
        """Whether each token is a step of its own: `pool` and `unpool` return what they are given."""
        ...

    def to_scan_order(self, x: Inner) -> Inner:
        """Bring tokens from stored order into the order in which convolution and scan visit them."""
        ...

    def from_scan_order(self, y: Inner) -> Inner:
        """Undo `to_scan_order`."""
        ...

    def pool(self, x: Inner, scores: Scores | None = None, *, reverse: bool = False) -> Pooled:
        """Pool tokens in scan order to what the scan reads, in float32 or wider if anything is averaged."""
        ...

    def unpool(self, y: Pooled, *, reverse: bool = False) -> Inner:
        """Give each token, in scan order, its result of the scan."""
        ...


@dataclass(frozen=True)
class NoPooling:
    """Vim: every token is a step of the scan."""

    tokens: int

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
    """FastVim: one step per row of a grid; where `transposed`, one step per column.

    Args:
        rows, columns: The *stored* grid: token i lies at (i // columns, i % columns).
        transposed: Visit the tokens column by column and pool along the rows' axis (every other block).
        method: "mean", "max" or "attention" (softmax of `scores` over the pooled tokens), or "none": the order
            of visits without any pooling.
        scale: Factor on the pooled mean (0.25 after masked pre-training of ratio 0.75).
        class_index: Place of a class token in the sequence, if there is one. It is a step of its own, is never
            pooled, and the grid transposes around it. Where that place lies inside a row, its step comes just
            before that row's.
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
        """The class token's place among the pooled steps."""
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
            pooled = largest(grid, axis=2)
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


def largest(x: jax.Array, axis: int) -> jax.Array:
    """Compute the maximum along `axis`; its gradient goes to the first entry that attains it.

    The rule of `jnp.max` compares entries with the maximum once more, and divides by the number of those equal to
    it. Where XLA computes the entries a second time, and a bit differently, none is, and the gradient is NaN.
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

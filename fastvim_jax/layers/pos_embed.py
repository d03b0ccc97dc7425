"""Learned position embeddings: bicubic resampling to another grid, and the fixed sin-cos table."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.sharding import mark_varying

CUBIC_A = -0.75


@lru_cache(maxsize=64)
def cubic_matrix(source: int, target: int, stretch: float = 0.0) -> np.ndarray:
    """Return the weights `target source` of bicubic resampling along one axis.

    Cubic convolution with a = -0.75, half-pixel centres, taps clamped at the borders, no antialiasing. The source is
    stretched over `target + stretch` positions, and only the first `target` positions are read.
    """
    position = (np.arange(target) + 0.5) * source / (target + stretch) - 0.5
    base = np.floor(position).astype(int)
    weights = np.zeros((target, source))
    for tap in range(-1, 3):
        x = np.abs(position - (base + tap))
        near = (CUBIC_A + 2) * x**3 - (CUBIC_A + 3) * x**2 + 1
        far = CUBIC_A * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(
            weights,
            (np.arange(target), np.clip(base + tap, 0, source - 1)),
            np.where(x <= 1, near, far),
        )
    return weights


def resize_pos_embed(
    table: Float[Array, "1 l d"],
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    stretch: float = 0.0,
) -> Float[Array, "1 m d"]:
    """Resample a table over a `source` grid to a `target` grid.

    Args:
        table: one row per cell of the source grid, flattened along the last axis first.
        source, target: sizes of the grids along their two axes.
        stretch: see `cubic_matrix`. If it is not 0, grids of equal size are resampled, too.
    """
    if source == target and not stretch:
        return table
    rows, columns = (
        jnp.asarray(cubic_matrix(s, t, stretch), table.dtype)
        for s, t in zip(source, target, strict=True)
    )
    grid = table.reshape(*source, table.shape[-1])
    resized = jnp.einsum("ij,kl,jld->ikd", rows, columns, grid, precision="highest")
    return resized.reshape(1, -1, table.shape[-1])


def resize_with_class_row(
    table: Float[Array, "1 l d"],
    source: tuple[int, int],
    target: tuple[int, int],
    source_index: int,
    target_index: int,
) -> Float[Array, "1 m d"]:
    """Resize a table that also holds the class token's row, and keep this row unchanged; see `resize_pos_embed`."""
    if source == target:
        return table
    row = table[:, source_index : source_index + 1]
    rest = jnp.concatenate([table[:, :source_index], table[:, source_index + 1 :]], axis=1)
    rest = resize_pos_embed(rest, source, target)
    return jnp.concatenate([rest[:, :target_index], row, rest[:, target_index:]], axis=1)


def add_table(tokens: Float[Array, "b l d"], table: Float[Array, "1 l d"]) -> Float[Array, "b l d"]:
    """Add a table to the tokens (of the same dtype). A matrix product sums the table's gradient over the batch.

    If it were a reduction, XLA would lay out every block's tokens on a GPU with the batch innermost, and transpose them
    back for each kernel: this takes 5 to 8 % of a training step.
    """
    return _add_table(tokens, mark_varying(table, tokens))


@jax.custom_vjp
def _add_table(tokens, table):
    return tokens + table


def _add_table_forward(tokens, table):
    return tokens + table, None


def _add_table_backward(_, gradient):
    # Multiply with eight equal rows, because XLA turns a product with a single row back into a reduction.
    ones = jnp.ones((8, gradient.shape[0]), gradient.dtype)
    sums = jax.lax.dot_general(ones, gradient, (((1,), (0,)), ((), ())), precision="highest")
    return gradient, sums[:1]


_add_table.defvjp(_add_table_forward, _add_table_backward)


def sincos_pos_embed(
    width: int, grid: tuple[int, int], *, computed_in: type[np.floating] = np.float32
) -> np.ndarray:
    """Build the fixed table `(rows * columns) width`, float32, row-major (He et al., Masked Autoencoders).

    The first half of the channels encodes the column, the second the row; each is sines, then cosines, of
    frequency 10000^(-k / (width / 4)). `width` must be a multiple of 4. The reference computes the tables
    of FastVim and Vim in float32, and those of ViT in float64 (`computed_in`), rounded once. NumPy's powers in float32
    differ among processors in the last place, and so do tables: by up to 4.5e-7 on a grid of 14 positions.
    """
    if width % 4:
        raise ValueError(f"a sin-cos table needs a width that is a multiple of 4, not {width}")
    quarter = np.arange(width // 4, dtype=computed_in) / computed_in(width / 4)
    frequency = (1.0 / computed_in(10000) ** quarter).astype(computed_in)
    row, column = np.meshgrid(*(np.arange(n, dtype=computed_in) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return table.astype(np.float32)

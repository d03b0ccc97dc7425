"""Choose which patches of an image a masked autoencoder keeps: at random, or from a boolean grid.

Every function has fixed shapes, so it runs under `jax.jit`. Letters: b batch, l patches of the whole grid,
k patches kept (of an image with fewer, the last of its k places are padding).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastvim_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Masking:
    """One mask for every image of a batch.

    Attributes:
        ids_keep: Positions of the kept patches in the row-major grid, `b k`. At padded places, any removed ones.
        ids_restore: For every position of the grid, its place in the list "kept patches, then removed ones".
        removed: 1 where a patch is removed, 0 where it is kept, `b l`.
        counts: Kept patches of every image, or None where all have k.
        grid: Rows and columns of the grid that the mask was given for, or None if it was drawn from noise.
    """

    ids_keep: Int[Array, "b k"]
    ids_restore: Int[Array, "b l"]
    removed: Float[Array, "b l"]
    counts: Int[Array, " b"] | None = None
    grid: tuple[int, int] | None = field(default=None, metadata={"static": True})

    @property
    def valid(self) -> Bool[Array, "b k"] | None:
        """False at padded places; None where there are none."""
        if self.counts is None:
            return None
        return jnp.arange(self.ids_keep.shape[1]) < self.counts[:, None]


def kept_count(patches: int, mask_ratio: float) -> int:
    """Return the number of patches kept of `patches`: int(patches * (1 - mask_ratio)).

    Raises:
        UserError: the ratio is not strictly between 0 and 1, or keeps no patch, or all of them.
    """
    if not 0.0 < mask_ratio < 1.0:
        raise UserError(f"mask_ratio={mask_ratio} must lie between 0 and 1, both excluded.")
    kept = int(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        raise UserError(
            f"mask_ratio={mask_ratio} keeps {kept} of {patches} patches: at least one must be kept and one removed."
        )
    return kept


def random_masking(noise: Float[Array, "b l"], kept: int, *, by_position: bool = True) -> Masking:
    """Keep the `kept` patches with the smallest noise of every image.

    Args:
        noise: Values to rank, for example uniform; another row for every image.
        kept: Number k of patches to keep.
        by_position: Sort kept patches by their position (Mamba encoders); else leave them in the order of their
            noise (ViT).
    """
    shuffled = jnp.argsort(noise, axis=1)
    first, rest = shuffled[:, :kept], shuffled[:, kept:]
    if by_position:
        first = jnp.sort(first, axis=1)
    order = jnp.concatenate([first, rest], axis=1)
    restore = jnp.argsort(order, axis=1)
    return Masking(first, restore, (restore >= kept).astype(noise.dtype))


def masking_of(removed: Any, *, places: int | None = None) -> Masking:
    """Turn given masks into a `Masking`; kept patches are sorted by position.

    Args:
        removed: Booleans `b rows columns`, True where a patch is removed; every image may have a mask of its own.
        places: Number k of places for kept patches; images that keep fewer are padded. None: every image must keep
            equally many. It must be given where `removed` is traced (inside `jax.jit`), because shapes must be known.

    Raises:
        UserError: no booleans `b rows columns`; an image keeps no patch or more than `places`; unequal counts without
            `places`; a traced mask without `places`. Values of a traced mask cannot be checked: it then keeps the first
            `places` patches, and removes the others.
    """
    if not isinstance(removed, jax.Array):
        removed = np.asarray(removed)
    if removed.ndim != 3 or removed.dtype != bool:
        raise UserError(
            "a mask is an array of booleans for batch, rows and columns of patches, True where a patch is removed; "
            f"got {removed.dtype} of shape {removed.shape}."
        )
    grid = removed.shape[1], removed.shape[2]
    flat = removed.reshape(removed.shape[0], grid[0] * grid[1])
    known = not isinstance(removed, jax.core.Tracer)
    equal = False
    if known:
        counts = np.asarray((~flat).sum(axis=1))
        equal = counts.size > 0 and bool((counts == counts[0]).all())
        if counts.size and counts.min() < 1:
            raise UserError(
                f"the mask of image {int(counts.argmin())} of the batch removes all {grid[0]} x {grid[1]} patches: "
                "leave out such images, or keep at least one patch."
            )
        if places is None:
            places = _equal_count(counts, equal)
        if counts.size and counts.max() > places:
            raise UserError(
                f"places={places}, but image {int(counts.argmax())} of the batch keeps {counts.max()} patches."
            )
    elif places is None:
        raise UserError(
            "inside jax.jit a mask's counts are not known: give places=, the largest number of patches kept."
        )
    if not 0 < places <= flat.shape[1]:
        raise UserError(
            f"places={places} must lie between 1 and the {flat.shape[1]} patches of the grid."
        )
    order = jnp.argsort(flat, axis=1, stable=True)  # kept (False) first, each part by position
    kept = jnp.minimum((~flat).sum(axis=1), places)
    restore = jnp.argsort(order, axis=1)
    full = known and equal and int(counts[0]) == places
    return Masking(
        order[:, :places],
        restore,
        (restore >= kept[:, None]).astype(jnp.float32),
        None if full else kept,
        grid,
    )


def _equal_count(counts: np.ndarray, equal: bool) -> int:
    if not equal:
        raise UserError(
            f"the masks of a batch keep between {counts.min()} and {counts.max()} patches: give places={counts.max()} "
            "to pad the shorter ones, or masks that keep equally many."
            if counts.size
            else "the batch is empty."
        )
    return int(counts[0])


def transpose_ids(ids: Int[Array, "*b"], rows: int, columns: int) -> Int[Array, "*b"]:
    """Return the positions of row-major `ids` in the transposed grid: (id % columns) * rows + id // columns."""
    return (ids % columns) * rows + ids // columns

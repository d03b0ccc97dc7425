"""Compute the norms of every unstacked parameter, gradient and update inside the step: one vector for each kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastvim_jax.models.parameters import parameter_infos


def parameter_norms(tree: Any) -> Float[Array, " p"]:
    """Compute the norm of each unstacked parameter of `tree`, in float32 or wider, in the order of `parameter_names`.

    Args:
        tree: parameters, or their gradients or updates.
    """
    squares = []
    for info, leaf in zip(parameter_infos(tree), jax.tree.leaves(tree), strict=True):
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        axes = tuple(range(leaf.ndim - info.ndim, leaf.ndim))
        squares.append(jnp.sum(wide * wide, axis=axes).reshape(-1))
    return jnp.sqrt(jnp.concatenate(squares))


def whole_norm(norms: Float[Array, " p"]) -> Float[Array, ""]:
    """Compute the norm of a tree from those of its parameters."""
    return jnp.linalg.norm(norms)


def parameter_names(tree: Any) -> list[str]:
    """List the unstacked parameters, e.g. `blocks.3.mixer.in_proj.kernel`, in the order of `parameter_norms`."""
    return [name for info in parameter_infos(tree) for name in info.unstacked_names()]

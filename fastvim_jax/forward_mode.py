"""Compute forward-mode derivatives of models, although their operations have reverse-mode derivatives only.

A vector-Jacobian product u ↦ uᵀJ is linear in u, so the vector-Jacobian product of this map is v ↦ Jv.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def jvp(
    function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Compute `function(*primals)` and its derivative along `tangents`, as `jax.jvp` does, by two reverse passes.

    It works for all models through XLA. Where the GPU kernels run, turn them off with FASTVIM_KERNELS=off, because
    their backward passes have no derivatives. For the whole Jacobian, `jax.jacrev` is cheaper.

    Args:
        function: returns arrays of floats, for example a model.
        primals: its arguments, pytrees of arrays of floats.
        tangents: direction of the derivative; structure, shapes and dtypes are those of `primals`.

    Returns:
        The value and the derivative, both of the value's structure.
    """
    value, pull = jax.vjp(function, *primals)
    origin = jax.tree.map(jnp.zeros_like, value)
    _, push = jax.vjp(pull, origin)
    return value, push(tuple(tangents))[0]

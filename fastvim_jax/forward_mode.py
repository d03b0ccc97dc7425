"""Forward-mode products of models, whose operations have hand-written derivatives in reverse mode only.

A vector-Jacobian product u ↦ uᵀJ is linear in u, so its own vector-Jacobian product is the map v ↦ Jv.
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

    It works for all models by XLA. Where the kernels run, turn them off with FASTVIM_KERNELS=off, because their
    backward passes have no derivatives. The whole Jacobian is cheaper by `jax.jacrev`.

    Args:
        function: returns arrays of floats, for example a model.
        primals: its arguments, pytrees of arrays of floats.
        tangents: directions, of the structure, shapes and dtypes of `primals`.

    Returns:
        The value and the derivative, both of the value's structure.
    """
    value, pull = jax.vjp(function, *primals)
    origin = jax.tree.map(jnp.zeros_like, value)
    _, push = jax.vjp(pull, origin)
    return value, push(tuple(tangents))[0]

"""Check the arguments of public operations. Errors say what an argument must be and what it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def as_floats(operation: str, name: str, x: Any, letters: str = "") -> jax.Array:
    """Return `x` as a JAX array; check that it holds floats and has the axes that `letters` name (any, if empty).

    Raises:
        ValueError: the message names the operation, the argument, what it must be and what it is.
    """
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError):
        raise ValueError(f"{operation}: {name} must be an array, got {type(x).__name__}") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{operation}: {name} must be floating point, got {array.dtype} of shape {array.shape}"
        )
    rank = len(letters.split())
    if letters and array.ndim != rank:
        raise ValueError(
            f"{operation}: {name} must have {rank} dimensions ({letters}), got shape {array.shape}"
        )
    return array


def expect_shape(
    operation: str, name: str, x: jax.Array, letters: str, shape: tuple[int, ...], beside: str
) -> None:
    """Raise ValueError unless `x` has this shape; `beside` names, for the message, the arguments that it must fit."""
    if x.shape != shape:
        raise ValueError(
            f"{operation}: {name} must have shape {shape} ({letters}) to go with {beside}, got {x.shape}"
        )


def float_dtype(operation: str, name: str, dtype: Any) -> jnp.dtype:
    """Return `dtype` as a dtype of floats.

    Raises:
        ValueError: it is none; the message names the operation and the argument.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{operation}: {name} must be a dtype of floats, got {dtype!r}")
    return found


def expect_counts(operation: str, **counts: Any) -> None:
    """Raise ValueError unless every count is a positive Python integer."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{operation}: {name} must be a positive integer, got {count!r}")

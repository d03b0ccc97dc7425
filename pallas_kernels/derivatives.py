"""Differentiate another form of a function; explain that a hand-written gradient has no forward mode."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

_nothing_differentiated: contextvars.ContextVar[bool] = contextvars.ContextVar("no", default=False)


@contextlib.contextmanager
def nothing_differentiated() -> Iterator[None]:
    """Trace programs that nobody will differentiate: `differentiated_as` leaves the function's operations in sight."""
    before = _nothing_differentiated.set(True)
    try:
        yield
    finally:
        _nothing_differentiated.reset(before)


def differentiated_as(other: Callable[..., Any], run: Callable[..., Any], *arrays: Any) -> Any:
    """Apply `run` to pytrees of arrays; where a gradient is asked for, apply `other`, which computes the same.

    For a form that is faster as long as nothing is differentiated. Neither function may close over tracers.
    """
    if _nothing_differentiated.get():
        return run(*arrays)
    call = jax.custom_vjp(run)
    call.defvjp(lambda *arrays: jax.vjp(other, *arrays), lambda pull, bars: pull(bars))
    return call(*arrays)


@contextlib.contextmanager
def reverse_mode_only(name: str, instead: str) -> Iterator[None]:
    """Replace JAX's error about forward mode, raised inside the block, by one that names an alternative.

    Args:
        name: what has derivatives in reverse mode only, such as "models" or an operation with its implementation.
        instead: what to use for forward mode.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            f"{name}: derivatives in reverse mode only (grad, vjp, jacrev). For forward mode (jvp, jacfwd, linearize) "
            f"use {instead}."
        ) from error

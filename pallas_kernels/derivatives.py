"""Explain the error when an operation with a hand-written gradient is differentiated in forward mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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

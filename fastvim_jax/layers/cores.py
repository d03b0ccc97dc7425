"""Tell how many cores of a CPU a program will run on, while it is traced."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from fastvim_jax.own_cores import own_cores
from pallas_kernels import gpu

_on_one_core = contextvars.ContextVar("on_one_core", default=False)


def local_cores() -> int:
    """Return how many cores the CPU device has, or 0 if programs are traced for several or other devices."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or gpu.switched_off() is not None:
        return 0
    return own_cores()


def program_cores() -> int:
    """Return on how many of the `local_cores` the program runs that is being traced: 1 inside `one_core`."""
    return min(local_cores(), 1) if _on_one_core.get() else local_cores()


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Trace programs that run on one core each, at the same time as others."""
    token = _on_one_core.set(True)
    try:
        yield
    finally:
        _on_one_core.reset(token)

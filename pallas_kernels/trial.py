"""Compile kernels once, before a program needs them, on devices where nobody has tried them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

_results: dict[Hashable, str | None] = {}


class Trial(NamedTuple):
    """Describe what to compile: a function of arrays, forward and backward.

    Attributes:
        run: function from the arrays to an array or a pytree of arrays, which uses kernels alone.
        arrays: pytrees of arrays or tracers, of which only shapes and dtypes count.
        key: tells this function from other functions of the same operation.
    """

    run: Callable[..., Any]
    arrays: tuple[Any, ...]
    key: Hashable


def compile_failure(operation: str, trial: Trial) -> str | None:
    """Return why the kernels of a call do not compile for the local device, or None if they do.

    They are compiled for the shapes of the call, because whether a kernel compiles depends on them. Nothing runs. The
    answer is cached for the process.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trial.arrays)
    shapes = tuple((x.shape, x.dtype.name) for x in jax.tree.leaves(like))
    key = (operation, trial.key, jax.tree.structure(like), shapes)
    if key not in _results:
        _results[key] = _in_a_thread(lambda: _failure(trial.run, like))
    return _results[key]


def _failure(run: Callable[..., Any], arrays: tuple[Any, ...]) -> str | None:
    def with_gradient(arrays):
        differentiable = lambda x: jax.numpy.issubdtype(x.dtype, jax.numpy.floating)  # noqa: E731
        leaves, tree = jax.tree.flatten(arrays)
        chosen = [x for x in leaves if differentiable(x)]

        def of_chosen(chosen):
            rest = iter(chosen)
            filled = [next(rest) if differentiable(x) else x for x in leaves]
            return run(*jax.tree.unflatten(tree, filled))

        out, pull = jax.vjp(of_chosen, chosen)
        return out, pull(out)

    try:
        jax.jit(with_gradient).lower(arrays).compile()
    except Exception as error:  # the compilers raise errors of many kinds
        device = jax.local_devices()[0]
        capability = getattr(device, "compute_capability", "unknown")
        lines = str(error).strip().splitlines() or [""]
        return (
            f"they do not compile for {device.device_kind} (compute capability {capability}): "
            f"{type(error).__name__}: {lines[0][:200]}"
        )
    return None


def _in_a_thread(function: Callable[[], str | None]) -> str | None:
    """Call a function in a new thread, so that it does not see the mesh and other contexts of the current trace."""
    results: list[str | None] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]

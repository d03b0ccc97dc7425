"""What the tests of the Mosaic GPU kernels share: an abstract H100, and errors relative to a reference."""

from __future__ import annotations

import contextlib
import functools
import re

import jax
import numpy as np
import pytest

from pallas_kernels import gpu

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 1), reason="the Mosaic GPU kernels need JAX 0.11.1"
)


def abstract_device():
    """Return an H100 that need not be there."""
    from jax._src.mesh import AbstractDevice

    return AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def abstract_h100():
    """Trace programs inside this context for an H100."""
    mesh = jax.sharding.AbstractMesh((), (), (), abstract_device=abstract_device())
    return jax.sharding.use_abstract_mesh(mesh)


def lower_for_h100(function, *args) -> str:
    """Return the program's text as lowered for CUDA."""
    with abstract_h100():
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def launches(text: str, kernel: str) -> int:
    """Count how often a lowered program starts a kernel; equal calls of a jitted function become one function."""
    parts = re.split(r"(?m)^\s*func\.func ", text)[1:]
    functions = {re.search(r"@([\w.]+)\(", part)[1]: part for part in parts}

    def own(line: str) -> bool:
        return "custom_call @mosaic_gpu" in line and (
            f"{kernel}_mosaic_gpu" in line or f'"{kernel}"' in line
        )

    @functools.cache
    def inside(name: str) -> int:
        called = re.findall(r"(?<!custom_)call @([\w.]+)\(", functions[name])
        return sum(map(own, functions[name].splitlines())) + sum(map(inside, called))

    return inside("main")


@contextlib.contextmanager
def interpreted():
    """Run kernels in the CPU interpreter; fail if the last of them had a race in shared memory.

    From JAX 0.12 on the interpreter itself ends at any kernel's race.
    """
    gpu.interpret(True)
    try:
        yield
    finally:
        gpu.interpret(False)
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    jax.effects_barrier()
    races = gpu_callbacks._races  # None before the first kernel, where get_races() fails
    assert races is None or not races.races_found


def relative_errors(got, wanted) -> list[float]:
    """Return ‖got - wanted‖ / ‖wanted‖ of every array; NaN, unwritten or missing values are errors of infinity.

    Where all of `wanted` is 0, as A's gradient of a single step is, so has `got` to be.
    """

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (a.shape, b.shape)
        assert np.all(np.isfinite(b)), "the reference is not finite"
        if not np.all(np.isfinite(a)):
            return np.inf
        if not b.any():
            return np.inf if a.any() else 0.0
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    return jax.tree.leaves(jax.tree.map(error, got, wanted))

"""Choose XLA's options for programs that run a model forward on a CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_EIGEN = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def forward_options(compute: jnp.dtype) -> dict[str, str] | None:
    """Return `compiler_options` of `jax.jit` for a model whose products have operands of dtype `compute`, or None.

    On CPUs, XLA gives products to the library YNNPACK. Eigen, which XLA takes without it, multiplies float32 matrices
    of a few hundred rows faster: docs/performance.md. Half precision stays with YNNPACK, and so do sums.
    """
    return dict(_EIGEN) if compute == jnp.float32 and _known() else None


@functools.cache
def _known() -> bool:
    """Return whether programs are for CPUs, and this XLA has the option: an experimental one, which may go."""
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=_EIGEN).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True

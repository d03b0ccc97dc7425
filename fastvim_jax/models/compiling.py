"""Choose XLA's options for programs that run a model forward on a CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_OPTIONS = {
    # Products go to Eigen, and only sums to YNNPACK.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    # Vectors as wide as the processor has them: with AVX-512, LLVM uses half of that by itself.
    "xla_cpu_prefer_vector_width": "512",
}


def forward_options(compute: jnp.dtype) -> dict[str, str] | None:
    """Return `compiler_options` of `jax.jit` for a model whose products have operands of dtype `compute`, or None.

    On CPUs, XLA gives products to the library YNNPACK. Eigen, which XLA takes without it, multiplies float32 matrices
    of a few hundred rows faster: docs/performance.md. Half precision stays with YNNPACK, and so do sums.
    """
    if jax.default_backend() != "cpu" or compute != jnp.float32:
        return None
    return {name: value for name, value in _OPTIONS.items() if _known(name, value)} or None


@functools.cache
def _known(name: str, value: str) -> bool:
    """Return whether this XLA has the option. Experimental ones may go."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True

"""Build RMSNorm and LayerNorm with statistics and outputs in float32 or wider.

Callers cast the output to the compute dtype.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from fastvim_jax.precision import Precision


class RMSNorm(nnx.RMSNorm):
    """An RMSNorm of inputs of any dtype, in its own dtype."""

    def __call__(self, x: Any, mask: Any = None) -> Any:
        """Widen x, so that the result is not rounded to its dtype, and normalise."""
        return super().__call__(x.astype(self.dtype), mask=mask)


class LayerNorm(nnx.LayerNorm):
    """A LayerNorm of inputs of any dtype, in its own dtype."""

    def __call__(self, x: Any, mask: Any = None) -> Any:
        """Widen x, so that the result is not rounded to its dtype, and normalise."""
        return super().__call__(x.astype(self.dtype), mask=mask)


def make_norm(
    kind: str, features: int, *, eps: float, precision: Precision, rngs: nnx.Rngs
) -> nnx.RMSNorm | nnx.LayerNorm:
    """Build the norm called `kind`: "rms" (scale only) or "layer" (scale and bias), over the last axis.

    Statistics and output have the dtype `precision.wide`. The variance is computed in a second pass, from the centred
    input, because E[x²] - E[x]² loses digits by cancellation.
    """
    norm = {"rms": RMSNorm, "layer": LayerNorm}[kind]
    return norm(
        features,
        epsilon=eps,
        dtype=precision.wide,
        param_dtype=precision.params,
        use_fast_variance=False,
        rngs=rngs,
    )


def checkpointed_norm(
    norm: nnx.RMSNorm | nnx.LayerNorm, x: Float[Array, "*rows d"]
) -> Float[Array, "*rows d"]:
    """Apply `norm`, save only its input for the backward pass, and recompute the statistics there.

    Otherwise JAX saves two more wide arrays of the size of x, and a loop over blocks holds these for every block.
    """
    graphdef, params = nnx.split(norm)
    run = jax.checkpoint(lambda params, x: nnx.merge(graphdef, params)(x), prevent_cse=False)
    return run(params, x)

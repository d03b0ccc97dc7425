"""RMSNorm and LayerNorm whose statistics and output are wide; callers cast to the compute dtype."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from fastvim_jax.precision import Precision


def make_norm(
    kind: str, features: int, *, eps: float, precision: Precision, rngs: nnx.Rngs
) -> nnx.RMSNorm | nnx.LayerNorm:
    """Build the norm called `kind`: "rms" (scale only) or "layer" (scale and bias), over the last axis.

    Statistics are two-pass and held in `precision.wide`, which is also the dtype of the output.
    """
    norm = {"rms": nnx.RMSNorm, "layer": nnx.LayerNorm}[kind]
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

    Otherwise JAX keeps two more wide arrays of the size of x, and a loop over blocks holds them for every block.
    """
    graphdef, params = nnx.split(norm)
    run = jax.checkpoint(lambda params, x: nnx.merge(graphdef, params)(x), prevent_cse=False)
    return run(params, x)

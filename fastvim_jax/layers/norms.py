"""RMSNorm and LayerNorm whose statistics and output are wide; callers cast to the compute dtype."""

from __future__ import annotations

from flax import nnx

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

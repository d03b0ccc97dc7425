"""Build the linear classifier on top of a backbone."""

from __future__ import annotations

from flax import nnx
from jax.nn.initializers import Initializer, zeros

from fastvim_jax.precision import Precision


def make_head(
    width: int, classes: int, *, kernel_init: Initializer, precision: Precision, rngs: nnx.Rngs
) -> nnx.Linear:
    """Build the linear layer from features `b width` to logits `b classes`, which are float32 or wider."""
    return nnx.Linear(
        width,
        classes,
        kernel_init=kernel_init,
        bias_init=zeros,
        dtype=precision.wide,
        param_dtype=precision.params,
        precision=precision.lax,
        rngs=rngs,
    )

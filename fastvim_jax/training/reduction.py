"""Sum the devices' gradients in a chosen dtype (`mesh.reduction`).

By default XLA's partitioner inserts the sums, and sums each gradient in the dtype in which it was computed. That is
float32, except in half precision with activations="compute": there the gradients of products' weights are bfloat16.
Here instead every device computes the gradient of its own part of the batch, and all are averaged in the chosen dtype.
A message in bfloat16 has half the bytes of float32. It rounds each device's gradient and every sum on
the way to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from fastvim_jax.distributed.mesh import Reduction
from fastvim_jax.distributed.sharding import BATCH
from pallas_kernels.dtypes import wide_dtype


def averaged_gradient(
    compute: Callable[[Any, Any], tuple[Any, Any]], reduction: Reduction
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Make `compute(params, batch) -> (report, gradient)` run on each device's part of the batch, and average results.

    Both must be means over the batch, so that the mean over equal parts is the mean over the whole. The ambient mesh
    must not shard parameters. On one device nothing changes.

    Args:
        compute: takes parameters and a pytree of arrays with the batch as their first axis.
        reduction: dtype of the gradients' sums. "float32" keeps wider ones wide.
    """

    def run(params: Any, batch: Any) -> tuple[Any, Any]:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size == 1:
            return compute(params, batch)

        def mean(leaf: jax.Array, dtype: Any) -> jax.Array:
            total = jax.lax.psum((leaf / mesh.size).astype(dtype), mesh.axis_names)
            return total.astype(leaf.dtype)

        def one_device(params: Any, part: Any) -> tuple[Any, Any]:
            report, gradient = compute(params, part)
            report = jax.tree.map(lambda leaf: mean(leaf, leaf.dtype), report)
            return report, jax.tree.map(lambda leaf: mean(leaf, _dtype(leaf, reduction)), gradient)

        on_each_device = jax.shard_map(
            one_device, mesh=mesh, in_specs=(P(), BATCH), out_specs=P(), check_vma=False
        )
        return on_each_device(params, batch)

    return run


def _dtype(leaf: jax.Array, reduction: Reduction) -> Any:
    return jnp.bfloat16 if reduction == "bfloat16" else wide_dtype(leaf.dtype)

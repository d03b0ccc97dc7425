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

from fastvim_jax.distributed.mesh import MeshConfig, Reduction
from fastvim_jax.distributed.sharding import BATCH
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.sharding import sums_as_computed


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


def runs_by_device(model: Any, mesh: MeshConfig, *, averages_images: bool) -> bool:
    """Return whether each device of `mesh` should compute the gradient of its own images (`gradient_by_device`).

    If the mesh shards parameters, blocks in a loop, and blocks that are computed again, gather theirs one after the
    other, which takes less memory.

    Args:
        model: the model's config.
        mesh: how the devices are used.
        averages_images: whether the loss is a mean over images.
    """
    if not averages_images or mesh.fsdp == 1:
        return averages_images
    encoder = getattr(model, "encoder", model)
    return encoder.blocks == "unroll" and encoder.remat == "none"


def gradient_by_device(compute: Callable[..., tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
    """Make `compute(params, batch) -> (report, gradient)` run on each device's part of the batch.

    The program on a device is then that of one device alone, and JAX sums each gradient over the devices, in the dtype
    in which it was computed. If XLA's partitioner put in the sums, it would sum the parameters of every block by
    themselves, and one more kernel would write each of them before: 247 kernels in a step of FastVim-S.

    A batch in parts (`accumulate`) is summed over the devices once, in the parameters' dtype. Sharded parameters are
    gathered before. On one device nothing changes.

    Args:
        compute: called with `over_devices=True` inside. The loss that it differentiates, and its report, must then pass
            through `mean_over_devices`.
    """

    def run(params: Any, batch: Any) -> tuple[Any, Any]:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return compute(params, batch)

        def one_device(params: Any, part: Any) -> tuple[Any, Any]:
            with sums_as_computed():
                return compute(params, part, over_devices=True)

        specs = P(), BATCH
        return jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=P())(params, batch)

    return run


def mean_over_devices(tree: Any) -> Any:
    """Average a loss or metrics over the devices of `gradient_by_device`."""
    return jax.lax.pmean(tree, jax.sharding.get_abstract_mesh().axis_names)


def sum_over_devices(tree: Any) -> Any:
    """Add up what varies over the devices of `gradient_by_device`."""
    return jax.lax.psum(tree, jax.sharding.get_abstract_mesh().axis_names)


def _dtype(leaf: jax.Array, reduction: Reduction) -> Any:
    return jnp.bfloat16 if reduction == "bfloat16" else wide_dtype(leaf.dtype)

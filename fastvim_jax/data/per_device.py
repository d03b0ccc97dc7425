"""Work on each device's own images inside a step that is sharded over a mesh."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def on_each_device(work: Callable[..., Array], *arrays: Array) -> Array:
    """Run `work` on each device's share of the batch, because the partitioner may gather what indices read."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if mesh.empty or mesh.size == 1 or not automatic or len(arrays[0]) % mesh.size:
        return work(*arrays)
    split = P(mesh.axis_names)
    return jax.shard_map(work, in_specs=split, out_specs=split, check_vma=False)(*arrays)

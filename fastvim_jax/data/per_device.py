"""Process each device's own images inside a step that is sharded over a mesh, a few images at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

CHUNK = 128
"""Largest number of images at a time, because intermediate results take about ten megabytes per image."""


def on_each_device(work: Callable[..., Array], *arrays: Array) -> Array:
    """Run `work` on each device's share of the batch. Otherwise XLA's partitioner may gather arrays that are indexed.

    Args:
        work: a function of arrays whose first axis is the batch. It must treat each image independently.
        arrays: its arguments, for the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if mesh.empty or mesh.size == 1 or not automatic or len(arrays[0]) % mesh.size:
        return _in_chunks(work, *arrays)
    split = P(mesh.axis_names)

    def share(*own: Array) -> Array:
        return _in_chunks(work, *own)

    return jax.shard_map(share, in_specs=split, out_specs=split, check_vma=False)(*arrays)


def _in_chunks(work: Callable[..., Array], *arrays: Array) -> Array:
    """Run `work` on chunks of equal size, one after the other."""
    count = len(arrays[0])
    size = next(size for size in range(min(CHUNK, count), 0, -1) if count % size == 0)
    if size == count or 4 * size < CHUNK:  # small chunks would leave a device idle
        return work(*arrays)
    parts = [array.reshape(-1, size, *array.shape[1:]) for array in arrays]
    done = jax.lax.map(lambda part: work(*part), tuple(parts))
    return done.reshape(count, *done.shape[2:])

"""What the cases on eight simulated devices share: meshes, placing, and what a compiled program gathers."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import selective_scan
from pallas_kernels.selective_scan import implementations
from pallas_kernels.selective_scan.sharded import Sharded

BOUND = 2e-6
TYPES = pytest.mark.parametrize(
    "types", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
BATCH = ("data", "fsdp")


def mesh_of(types: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(types,) * 3)


def put(arrays, specs, mesh):
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, arrays, specs)


def compiled(function, *args, **options):
    """Return the program, and how many numbers each of its all-gathers makes."""
    program = jax.jit(function, **options).lower(*args).compile()
    shapes = re.findall(r"\w+\[([\d,]*)\]\S* all-gather\(", program.as_text())
    return program, [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


def objective(args, **options):
    y, last = selective_scan(**args, **options, return_last_state=True)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last.astype(jnp.float32)))


def scan_specs(args, batch, channels, weights):
    spec = {
        "A": P(weights),
        "D": P(weights),
        "delta_bias": P(weights),
        "B": P(batch),
        "C": P(batch),
    }
    return {name: spec.get(name, P(batch, None, channels)) for name in args}


def asked(monkeypatch):
    """Treat the XLA scans as if they held kernels."""
    monkeypatch.setattr(implementations, "Sharded", lambda backend, opaque: Sharded(backend, True))


def shapes_on(mesh, arrays, specs):
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        arrays,
        specs,
    )


def kernels_in(text: str) -> list[str]:
    """Return the types of the calls of Mosaic kernels in a lowered program."""
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    return [line.rpartition(" : ")[2] for line in calls]

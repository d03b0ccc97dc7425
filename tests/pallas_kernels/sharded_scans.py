"""Scans and convolutions on eight simulated devices; run by `test_sharded` in a process that has them.

Where a test says "asked", XLA's partitioner asks the operation how it splits, as it does for kernels; the shares are
then computed by XLA, since the kernels' interpreter knows one device only.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import causal_conv1d, selective_scan
from tests.pallas_kernels import test_bidirectional_scan as pair
from tests.pallas_kernels.mosaic_support import relative_errors
from tests.pallas_kernels.sharded_support import (
    BATCH,
    BOUND,
    TYPES,
    asked,
    compiled,
    mesh_of,
    objective,
    put,
    scan_specs,
)
from tests.pallas_kernels.test_mosaic_scan import draw

# How u and the weights are split, and how many groups B and C have.
SCANS = {
    "data": (BATCH, None, None, 1),
    "fsdp": (BATCH, None, "fsdp", 1),
    "channels": ("data", "model", "model", 1),
    "channels 4 ways, 2 groups": ("data", ("model", "fsdp"), ("model", "fsdp"), 2),
}
MORE_SCANS = {
    "channels 2 ways, 3 groups": (BATCH, "model", "model", 3),
    "channels 2 ways, 4 groups": (BATCH, "model", "model", 4),
}


def check_scan(seed, types, place, length=9, implementation="xla_sequential", dtype="float32"):
    rng = np.random.default_rng(seed)
    batch, channels, weights, groups = (SCANS | MORE_SCANS)[place]
    args = draw(rng, 8, length, 48, 2, groups, dtype)
    options = {"reverse": bool(rng.integers(2))}
    wanted = jax.jit(
        jax.value_and_grad(lambda a: objective(a, **options, implementation=implementation))
    )(args)  # By the same implementation: two of them differ by more in one of twenty draws.
    mesh = mesh_of(types)
    args = put(args, scan_specs(args, batch, channels, weights), mesh)
    run, gathers = compiled(
        jax.value_and_grad(lambda a: objective(a, **options, implementation=implementation)), args
    )
    # Of u's shape, or any larger part of it, nothing; weights may be.
    share = args["u"].sharding.shard_shape(args["u"].shape)
    assert all(size < math.prod(share) for size in gathers)
    assert (weights == "fsdp") <= bool(gathers)
    got = run(args)
    for x, gradient in zip(jax.tree.leaves(args), jax.tree.leaves(got[1]), strict=True):
        assert gradient.dtype == x.dtype
        if types == AxisType.Explicit:
            assert gradient.sharding.is_equivalent_to(x.sharding, x.ndim)
    assert max(relative_errors(got, wanted)) < (BOUND if dtype == "float32" else 1e-2)


@pytest.mark.drawn("sharded scans")
@TYPES
@pytest.mark.parametrize(
    "place", [*SCANS, *(pytest.param(place, marks=pytest.mark.slow) for place in MORE_SCANS)]
)
def test_scan(seed, monkeypatch, types, place):
    asked(monkeypatch)
    check_scan(seed, types, place, length=70 if place == "channels" else 9)


@TYPES
def test_both_directions(seed, monkeypatch, types):
    """Scan each device's sequences and channels in both directions."""
    asked(monkeypatch)
    rng = np.random.default_rng(seed)
    args = pair.draw(rng, 8, 9, 48, 2, int(rng.integers(1, 3)))
    gradients = jax.grad(lambda a: pair.loss(a, "xla_sequential"))
    wanted = jax.jit(gradients)(args)
    of_weights = {name: P(None, "model") for name in ("A", "D", "delta_bias")}
    of_steps = {name: P(None, BATCH) for name in "BC"}
    specs = {
        name: (of_weights | of_steps).get(name, P(None, BATCH, None, "model")) for name in args
    }
    args = put(args, specs, mesh_of(types))
    run, gathers = compiled(gradients, args)
    share = args["u"].sharding.shard_shape(args["u"].shape)
    assert all(size < math.prod(share) for size in gathers)  # groups of B and C
    assert max(relative_errors(run(args), wanted)) < BOUND


@pytest.mark.drawn("sharded scans")
@pytest.mark.slow
def test_scan_in_bfloat16(seed, monkeypatch):
    asked(monkeypatch)
    check_scan(seed, AxisType.Auto, "channels", dtype="bfloat16")


@pytest.mark.drawn("sharded scans")
@pytest.mark.slow
@pytest.mark.parametrize("place", ["data", "channels"])
def test_the_partitioner_splits_xla_scans_by_itself(seed, place):
    check_scan(seed, AxisType.Auto, place)


@pytest.mark.drawn("sharded scans")
@pytest.mark.slow
def test_associative_scan(seed):
    check_scan(seed, AxisType.Explicit, "channels 4 ways, 2 groups", 9, "xla_associative")


@pytest.mark.drawn("sharded scans")
def test_sharding_known_from_the_ambient_mesh_only(seed, monkeypatch):
    """Read the sharding from the ambient mesh: no argument is sharded when the program starts."""
    asked(monkeypatch)
    args = draw(np.random.default_rng(seed), 8, 9, 48, 2)
    wanted = objective(args, implementation="xla_sequential")
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        split = jax.lax.with_sharding_constraint

        def run(args):
            args = {name: split(x, P(BATCH)) if x.ndim > 2 else x for name, x in args.items()}
            return objective(args, implementation="xla_sequential")

        run, gathers = compiled(run, args)
        assert not gathers
        np.testing.assert_allclose(run(args), wanted, rtol=1e-5)


@pytest.mark.drawn("sharded scans")
def test_vmap(seed, monkeypatch):
    """Split the mapped axis, too."""
    asked(monkeypatch)
    rng = np.random.default_rng(seed)
    args = draw(rng, 4, 9, 48, 2)
    shared = args.pop("A")
    stacked = jax.tree.map(lambda x: jnp.stack([x, x * 0.5]), args)
    gradients = jax.vmap(
        jax.grad(lambda a, A: objective({**a, "A": A}, implementation="xla_sequential"), (0, 1)),
        (0, None),
    )
    wanted = jax.jit(gradients)(stacked, shared)
    mesh = mesh_of(AxisType.Auto)
    specs = {name: P("data", "fsdp") if x.ndim > 3 else P("data") for name, x in stacked.items()}
    stacked = put(stacked, specs, mesh)
    run, gathers = compiled(gradients, stacked, jax.device_put(shared, NamedSharding(mesh, P())))
    assert not gathers
    assert max(relative_errors(run(stacked, shared), wanted)) < BOUND


@pytest.mark.drawn("sharded scans")
def test_blocks_under_scan_with_remat_and_donation(seed, monkeypatch):
    asked(monkeypatch)
    args = draw(np.random.default_rng(seed), 8, 9, 48, 2)
    u = args.pop("u")
    layers = jax.tree.map(lambda x: jnp.stack([x * s for s in (0.5, 0.8, 1.0)]), args)

    def step(u, layers):
        @jax.checkpoint
        def block(u, layer):
            return selective_scan(u, **layer, implementation="xla_sequential"), None

        loss = lambda u, layers: jnp.sum(jnp.sin(jax.lax.scan(block, u, layers)[0]))  # noqa: E731
        gradients = jax.grad(loss, (0, 1))(u, layers)
        return u - gradients[0], gradients[1]

    wanted = jax.jit(step)(u, layers)
    mesh = mesh_of(AxisType.Auto)
    u = jax.device_put(u, NamedSharding(mesh, P(BATCH)))
    specs = {name: P(None, BATCH) if x.ndim > 3 else P() for name, x in layers.items()}
    layers = put(layers, specs, mesh)
    run, gathers = compiled(step, u, layers, donate_argnums=0)
    assert not gathers
    got = run(u, layers)
    assert u.is_deleted()
    assert max(relative_errors(got, wanted)) < BOUND


@pytest.mark.drawn("sharded scans")
@pytest.mark.parametrize("weights", [None, "fsdp"])
def test_convolution(seed, weights):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    args = (normal(8, 9, 16), normal(3, 16), normal(16))
    gradients = jax.grad(lambda a: jnp.sum(jnp.sin(causal_conv1d(*a))))
    wanted = jax.jit(gradients)(args)
    channels = None if weights else "model"
    specs = (P(BATCH, None, channels), P(None, weights or channels), P(weights or channels))
    args = put(args, specs, mesh_of(AxisType.Explicit))
    assert max(relative_errors(jax.jit(gradients)(args), wanted)) < BOUND

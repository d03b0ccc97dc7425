"""Whole models on eight simulated devices; run by `test_sharded` in a process that has them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import gpu
from tests.pallas_kernels.mosaic_support import needs_mosaic, relative_errors
from tests.pallas_kernels.sharded_support import (
    BATCH,
    put,
)


@pytest.mark.drawn("sharded models")
@needs_mosaic
@pytest.mark.parametrize(
    ("types", "blocks"),
    [
        (AxisType.Explicit, "scan"),
        pytest.param(AxisType.Auto, "scan", marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, "unroll", marks=pytest.mark.slow),
    ],
)
def test_model(seed, monkeypatch, types, blocks):
    """Run a FastVim with every parameter split over half the mesh."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    check_model(seed, types, "fastvim_tiny_patch16_224", blocks=blocks, remat="block")


@pytest.mark.drawn("sharded models")
@pytest.mark.slow
def test_vit(seed):
    check_model(seed, AxisType.Explicit, "vit_tiny_patch16_224", num_heads=4)


@pytest.mark.drawn("sharded models")
@needs_mosaic
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_joined_vit(seed, monkeypatch, types):
    """Run a ViT whose residual sums and norms are split over the devices as kernels are; it computes in bfloat16."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    options = {"num_heads": 2, "fast": True, "blocks": "scan"}
    check_model(seed, types, "vit_tiny_patch16_224", bound=3e-2, **options)


@pytest.mark.drawn("sharded models")
def test_model_inside_a_partly_manual_shard_map(seed):
    """Turn axes that are still Explicit inside the shard_map into Auto; the caller's own stay Manual."""
    from flax import nnx

    from fastvim_jax.models import create_model

    model = create_model(
        "fastvim_tiny_patch16_224", num_classes=4, depth=2, embed_dim=32, image_size=16,
        patch_size=8, rngs=nnx.Rngs(seed),
    )  # fmt: skip
    graphdef, params = nnx.split(model)
    images = jax.random.normal(jax.random.key(seed), (8, 16, 16, 3))
    run = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
    wanted = jax.jit(run)(params, images)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    own = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"}
    )
    placed = put(params, jax.tree.map(lambda _: P(), params), mesh)
    images = jax.device_put(images, NamedSharding(mesh, P(("data", "fsdp"))))
    assert max(relative_errors(jax.jit(own)(placed, images), wanted)) < 1e-5


@pytest.mark.drawn("sharded models")
@pytest.mark.parametrize("activations", ["wide", "compute"])
def test_weights_gradients_inside_a_shard_map_are_summed_in_float32(seed, activations):
    """Sum whole numbers: they are exact in bfloat16 on one device; their sum over eight devices is not."""
    from flax import nnx

    from fastvim_jax.layers.linear import linear
    from fastvim_jax.precision import Precision

    precision = Precision("bfloat16", activations=activations)
    graphdef, params = nnx.split(nnx.Linear(3, 5, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    x, y_bar = (rng.integers(1, 16, (8, size)) for size in (3, 5))

    def loss(params, x, y_bar):
        y = linear(nnx.merge(graphdef, params), x, precision)
        return jnp.sum(y * y_bar.astype(y.dtype))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P("data"), P("data"))
    run = jax.jit(jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=P()))
    got = run(params, *(jnp.asarray(a, jnp.float32) for a in (x, y_bar)))
    np.testing.assert_array_equal(got.kernel, np.float64(x.T @ y_bar))
    np.testing.assert_array_equal(got.bias, np.float64(y_bar.sum(0)))


def check_model(seed, types, name, bound=1e-4, **options):
    """Compare training and evaluation with one device; gradients lie like parameters, features like images."""
    from flax import nnx

    from fastvim_jax.models import create_model

    model = create_model(
        name, num_classes=4, depth=2, embed_dim=64, image_size=32,
        patch_size=8, drop_path=0.3, rngs=nnx.Rngs(seed), **options,
    )  # fmt: skip
    graphdef, params = nnx.split(model)
    images = jax.random.normal(jax.random.key(seed), (8, 32, 32, 3))
    keep = model.draw_drop_path(jax.random.key(seed), 8)

    def loss(params, images):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(images, drop_path_keep=keep)))

    def features(params, images):
        model = nnx.merge(graphdef, params)
        return model.features(images), model.intermediates(images)

    run, look = jax.jit(jax.value_and_grad(loss)), jax.jit(features)
    wanted, seen = run(params, images), look(params, images)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(types,) * 2)
    spread = lambda x: P(*[None] * (x.ndim - 1), None if x.shape[-1] % 2 else "fsdp")  # noqa: E731
    params = put(params, jax.tree.map(spread, params), mesh)
    images = jax.device_put(images, NamedSharding(mesh, P(BATCH)))
    got = run(params, images)
    assert max(relative_errors(got, wanted)) < bound
    looked = look(params, images)
    assert max(relative_errors(looked, seen)) < bound
    if types == AxisType.Explicit:
        assert jax.tree.map(jax.typeof, got[1]) == jax.tree.map(jax.typeof, params)
        assert all(jax.typeof(x).sharding.spec[0] == BATCH for x in jax.tree.leaves(looked))

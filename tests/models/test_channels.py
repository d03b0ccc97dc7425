"""Channel models: random ones against the oracle, subsets and orders of channels, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.layers.channel_pooling import ChannelPooling, channel_poolings
from fastvim_jax.layers.pooling import GridPooling, NoPooling
from fastvim_jax.models import create_model, list_models
from fastvim_jax.models.channel_mamba import ChannelMamba, ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.parameters import named_parameters, parameter_infos, replace_parameters
from fastvim_jax.models.registry import build_model
from tests.models.test_against_oracle import random_parameters
from tests.oracle.channels import block_steps, channel_mamba, channel_vit, coordinates
from tests.pallas_kernels.mosaic_support import abstract_h100, needs_mosaic, relative_errors
from tests.support import assert_close, x64

SIZES: dict[str, Any] = {
    "image_size": (6, 9), "patch_size": (2, 3), "channels": 3, "num_classes": 2, "embed_dim": 4,
    "dtype": "float64", "param_dtype": "float64",
}  # fmt: skip
MAMBAS = {
    "attention": {"pooling": "attention", "pool_axes": "two_axes", "depth": 3},
    "after the skip, columns": {"unpool": "after_skip", "pool_axes": "rows", "scan_order": "spatial", "depth": 1},
    "overlapping, column-major": {"stride": (1, 2), "token_order": "column", "pooling": "max", "depth": 2},
    "token at the head": {"pooling": "none", "class_token": "head", "scan_order": "spatial", "depth": 1},
}  # fmt: skip


def gradients_and_oracle(config: Any, oracle: Any, rng: np.random.Generator) -> None:
    """Hold outputs to the oracle, and one random direction of the gradient to its central difference."""
    with x64():
        graphdef, abstract = nnx.split(
            nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
        )
        shapes = {n: i.shape for i in parameter_infos(abstract) for n in i.unstacked_names()}
        flat = random_parameters(shapes, rng)
        images = rng.standard_normal((2, *config.image_size, 2))
        ids = np.array([[2, 0], [1, 2]], np.int32)
        weights = rng.standard_normal((2, config.num_classes))

        @jax.jit
        def run(params: Any, images: jax.Array) -> Any:
            def objective(params: Any, images: jax.Array) -> Any:
                logits = nnx.merge(graphdef, params)(images, channel_ids=ids)
                return (logits * weights).sum(), logits

            return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, images)

        (param_grads, image_grad), logits = run(
            replace_parameters(abstract, flat), jnp.asarray(images)
        )
        grads = {k: np.asarray(v) for k, v in named_parameters(param_grads).items()}

    def reference(flat: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
        return oracle(flat, config, images, channel_ids=ids)

    assert_close(logits, reference(flat, images), 1e-9)
    step = 1e-7 if config.pooling == "max" else 1e-6
    towards = {name: rng.standard_normal(value.shape) for name, value in flat.items()}
    along = rng.standard_normal(images.shape)
    ahead, behind = (
        (
            reference({n: v + s * towards[n] for n, v in flat.items()}, images + s * along)
            * weights
        ).sum()
        for s in (step, -step)
    )
    analytic = sum((grads[name] * towards[name]).sum() for name in flat)
    analytic += (np.asarray(image_grad) * along).sum()
    assert abs(analytic - (ahead - behind) / (2 * step)) < 1e-5 * max(abs(analytic), 1.0)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize("options", MAMBAS.values(), ids=MAMBAS)
def test_any_channel_mamba_equals_the_oracle(
    options: dict[str, Any], rng: np.random.Generator
) -> None:
    config = ChannelMambaConfig(**SIZES, **options)
    gradients_and_oracle(config, lambda *a, **k: channel_mamba(*a, **k)[0], rng)


def test_channel_vit_equals_the_oracle(rng: np.random.Generator) -> None:
    config = ChannelViTConfig(**{**SIZES, "image_size": (8, 9)}, depth=1, num_heads=2)
    with x64():
        graphdef, abstract = nnx.split(
            nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
        )
        shapes = {n: i.shape for i in parameter_infos(abstract) for n in i.unstacked_names()}
        flat = random_parameters(shapes, rng)
        images, ids = rng.standard_normal((1, 6, 6, 2)), np.array([[2, 0]], np.int32)
        model = nnx.merge(graphdef, replace_parameters(abstract, flat))
        logits = jax.jit(lambda x: model(x, channel_ids=ids))(jnp.asarray(images))
    assert_close(logits, channel_vit(flat, config, images, channel_ids=ids), 1e-9)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize(
    "config",
    [
        ChannelMambaConfig(**SIZES, out_indices=(1,), depth=2),
        ChannelMambaConfig(
            **SIZES, out_indices=(0,), depth=1, scan_order="spatial", token_order="column",
            pooling="none", class_token="middle",
        ),
        ChannelViTConfig(**SIZES, out_indices=(0,), depth=1, num_heads=2),
    ],
    ids=["channel-first", "spatial-first, by columns", "vit"],
)  # fmt: skip
def test_dense_features_are_means_over_the_channels_of_a_patch(
    config: Any, rng: np.random.Generator
) -> None:
    """Compare dense features with means over any subset of channels of a patch; each token's place is the oracle's."""
    with x64():
        model = build_model(config, rngs=nnx.Rngs(0))
        model.out_norms[0].scale[...] = jnp.asarray(rng.normal(size=4))
        images, ids = jnp.asarray(rng.standard_normal((2, 6, 9, 2))), np.array([[2, 0]])
        (found,) = model(images, channel_ids=ids)
        hidden = np.asarray(model.intermediates(images, channel_ids=ids)[-1][1])
        if hidden.shape[1] == 19:  # 3 x 3 patches of 2 channels, and a class token
            hidden = np.delete(hidden, 0 if isinstance(config, ChannelViTConfig) else 9, axis=1)
        by_columns = getattr(config, "token_order", "row") == "column"
        order = SimpleNamespace(scan_order=getattr(config, "scan_order", "spatial"))
        expected = np.zeros((2, 3, 3, 4))
        for token, at in enumerate(coordinates(order, (3, 3), 2)):
            place = (at["column"], at["row"]) if by_columns else (at["row"], at["column"])
            expected[:, *place] += hidden[:, token] / 2
        assert_close(found, model.out_norms[0](jnp.asarray(expected)), 1e-9)


@pytest.mark.parametrize("scan_order", ["channel", "spatial"])
def test_steps_are_the_oracles_for_any_grid(scan_order: str, rng: np.random.Generator) -> None:
    grid, count = (int(rng.integers(1, 5)), int(rng.integers(1, 5))), int(rng.integers(1, 4))
    tokens = jnp.asarray(rng.standard_normal((1, grid[0] * grid[1] * count, 2)))
    axes = ["alternate", "columns", "rows"] + ["two_axes"] * (scan_order == "channel")
    for pool_axes in axes:
        poolings = channel_poolings(
            grid, count, scan_order=scan_order, pool_axes=pool_axes, method="mean"
        )

        class Config:
            pooling = "mean"

        Config.scan_order, Config.pool_axes = scan_order, pool_axes
        for block, pooling in enumerate(poolings):
            order, steps = block_steps(Config, block, coordinates(Config, grid, count))
            visited = pooling.to_scan_order(tokens)
            assert np.array_equal(visited, tokens[:, order])
            assert np.array_equal(pooling.from_scan_order(visited), tokens)
            pooled = pooling.pool(visited)
            expected = np.stack([np.asarray(visited)[:, step].mean(1) for step in steps], 1)
            assert pooled.shape[1] == pooling.scan_length
            assert np.allclose(pooled, expected, atol=1e-6)
            unpooled = np.asarray(pooling.unpool(pooled))
            for number, step in enumerate(steps):
                assert np.array_equal(unpooled[:, step], pooled[:, [number] * len(step)])


def test_grids_of_lines_are_left_to_the_grids_kernels() -> None:
    spatial = channel_poolings((2, 3), 4, scan_order="spatial", pool_axes="alternate", method="max")
    assert spatial[0] == GridPooling(8, 3, method="max")
    assert isinstance(spatial[1], ChannelPooling) and spatial[1].contiguous
    channel = channel_poolings((2, 3), 4, scan_order="channel", pool_axes="two_axes", method="mean")
    assert channel[0] == GridPooling(2, 12)
    assert [isinstance(p, ChannelPooling) and p.contiguous for p in channel] == [False, True, False]
    assert channel_poolings(
        (2, 3), 4, scan_order="channel", pool_axes="columns", method="none", class_token=True
    ) == (NoPooling(25),)


@pytest.fixture(scope="module")
def small() -> ChannelMamba:
    options = {"embed_dim": 8, "depth": 1, "image_size": 8, "patch_size": 4, "channels": 4}
    return create_model(
        "fastchannelvim_tiny_patch16_224", num_classes=2, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.drawn("more of the models", one_in=6)
def test_ids_say_which_channels_an_input_holds(
    small: ChannelMamba, rng: np.random.Generator
) -> None:
    images = jnp.asarray(rng.standard_normal((1, 8, 8, 2)), jnp.float32)
    call = jax.jit(lambda x, ids: small(x, channel_ids=ids))
    first = call(images, jnp.array([[0, 1]]))
    assert_close(small(images), first, 1e-5)
    others = call(images, jnp.array([[2, 1]]))
    assert np.abs(others - first).max() > 1e-6
    assert np.isnan(call(images, jnp.array([[0, 4]]))).all()


def test_misfits_are_refused_by_name(small: ChannelMamba) -> None:
    images = jnp.zeros((2, 8, 8, 3))
    for ids, what in (
        (np.array([[0, 1]]), "give one id per channel"),
        (np.array([[0, 1, 4]]), "it knows 0 to 3"),
    ):
        with pytest.raises(UserError, match=what):
            small(images, channel_ids=ids)
    with pytest.raises(UserError, match="5 channels.*built for 4"):
        small(jnp.zeros((1, 8, 8, 5)))
    with pytest.raises(UserError, match="smaller than one 4x4 patch"):
        small(jnp.zeros((1, 3, 8, 4)))
    for options, what in (
        ({"pool_axes": "two_axes", "scan_order": "spatial"}, "channel-first order only"),
        ({"class_token": "middle"}, "FastChannelVim has no class token"),
    ):
        with pytest.raises(UserError, match=what):
            ChannelMambaConfig(**options)
    with pytest.raises(UserError, match="plain attention"):
        ChannelViTConfig(pooling="mean")


def test_every_size_and_patch_is_registered() -> None:
    for family in ("channelvim", "fastchannelvim", "channelvit"):
        names = [n for n in list_models(f"{family}_*")]
        assert names == [
            f"{family}_{size}_patch{patch}_224" for patch in (16, 8) for size in ("tiny", "small", "base")
        ]  # fmt: skip


@pytest.mark.drawn("models on kernels", one_in=20)
@needs_mosaic
@pytest.mark.parametrize(
    "options",
    [
        {"scan_order": "spatial"},
        {"pool_axes": "two_axes", "pooling": "max", "depth": 3},
    ],
    ids=["spatial-first", "two axes"],
)
def test_lines_of_a_channel_grid_run_in_the_fused_core(
    options: dict[str, Any], rng: np.random.Generator
) -> None:
    sizes = {"embed_dim": 64, "depth": 2, "image_size": 24, "patch_size": 8, "channels": 2}
    model = create_model(
        "fastchannelvim_tiny_patch16_224", num_classes=3, rngs=nnx.Rngs(1), **{**sizes, **options}
    )
    graphdef, params = nnx.split(model)
    channels = options.get("channels", 2)
    images = jnp.asarray(rng.standard_normal((1, 24, 16, channels)), jnp.float32)

    def objective(params: Any, images: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(images)))

    with abstract_h100():
        traced = jax.jit(jax.value_and_grad(objective)).trace(params, images)
    got = traced.lower().compile()(params, images)
    wanted = jax.jit(lambda p, x: jax.value_and_grad(objective)(p, x))(params, images)
    assert max(relative_errors(got, wanted)) < 1e-4

"""Every registered name, and every option: builds, runs forward and backward, at several resolutions."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import UserError, create_model, list_models, model_config
from fastvim_jax.models import VisionMambaConfig, ViTConfig, build_model
from fastvim_jax.models.parameters import count_parameters
from tests.support import assert_close, checked

PARAMETERS = {
    "fastvim_tiny_patch16_224": 7_166_056,
    "fastvim_small_patch16_224": 25_832_680,
    "fastvim_base_patch16_224": 97_670_632,
    "fastvim_large_patch16_224": 340_229_096,
    "fastvim_huge_patch14_224": 702_370_280,
    "vim_tiny_patch16_224": 7_166_440,
    "vim_small_patch16_224": 25_833_448,
    "vim_base_patch16_224": 97_672_168,
    "vim_large_patch16_224": 340_231_144,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "mae_fastvim_tiny_patch16_224": 7_686_720,
    "mae_fastvim_small_patch16_224": 26_636_032,
    "mae_fastvim_base_patch16_224": 101_178_112,
    "mae_fastvim_large_patch16_224": 343_561_472,
    "mae_fastvim_huge_patch14_224": 705_358_412,
    "mae_vim_tiny_patch16_224": 7_686_912,
    "mae_vim_small_patch16_224": 26_636_416,
    "mae_vim_base_patch16_224": 101_178_880,
    "mae_vim_large_patch16_224": 343_562_496,
    "mae_vit_tiny_patch16_224": 9_231_360,
    "mae_vit_small_patch16_224": 28_204_800,
    "mae_vit_base_patch16_224": 111_655_680,
    "mae_vit_large_patch16_224": 329_239_296,
    "fastchannelvim_tiny_patch16_224": 6_907_361,
    "fastchannelvim_small_patch16_224": 25_316_129,
    "fastchannelvim_base_patch16_224": 96_638_369,
    "fastchannelvim_tiny_patch8_224": 6_983_393,
    "fastchannelvim_small_patch8_224": 25_468_193,
    "fastchannelvim_base_patch8_224": 96_942_497,
    "channelvim_tiny_patch16_224": 6_907_553,
    "channelvim_small_patch16_224": 25_316_513,
    "channelvim_base_patch16_224": 96_639_137,
    "channelvim_tiny_patch8_224": 6_983_585,
    "channelvim_small_patch8_224": 25_468_577,
    "channelvim_base_patch8_224": 96_943_265,
    "channelvit_tiny_patch16_224": 5_458_721,
    "channelvit_small_patch16_224": 21_534_113,
    "channelvit_base_patch16_224": 85_535_393,
    "channelvit_tiny_patch8_224": 5_534_753,
    "channelvit_small_patch8_224": 21_686_177,
    "channelvit_base_patch8_224": 85_839_521,
}

# Each value of each option stands in one model at least. Options of different parts share a model, because each
# model takes two programs to compile.
MAMBA_OPTIONS = [
    {},
    {"pooling": "max", "class_token": "head", "post_norm": "none", "pos_embed": False},
    {"pooling": "attention", "pool_axes": "columns", "conv_bias": False},
    {"pooling": "none", "class_token": "middle", "post_norm": "rms", "norm": "layer"},
    {"pooling": "none", "token_order": "column", "head_pool": "last", "layer_scale": 0.1},
    {"class_token": "middle", "pool_axes": "rows", "conv_width": 0},
    {"token_order": "column", "unpool": "after_skip", "pool_scale": 0.25, "head_pool": "max"},
    {"state_size": 8, "expand": 1, "conv_width": 3, "dt_rank": 5, "proj_bias": True},
    {"dtype": "bfloat16"},
]


def small(config, **options):
    """Return the same architecture, small enough for a test; depth 5 leaves a remainder of the period."""
    sizes = {"image_size": (24, 16), "patch_size": 4, "embed_dim": 16, "depth": 5, "num_classes": 7}
    if isinstance(config, ViTConfig):
        sizes["num_heads"] = 4
    return dataclasses.replace(config, **{**sizes, **options})


def forward(config, params, images, **kwargs):
    """Return the model's jitted output."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
    return jax.jit(lambda p: nnx.merge(graphdef, p)(images, **kwargs))(params)


def loss_and_gradient(config, params, images, **kwargs):
    """Return a jitted scalar of the model's output, and its gradient."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))

    def loss(params):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params)(images, **kwargs)))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("name", list_models())
def test_parameter_counts(name):
    full = nnx.state(nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0))))
    assert count_parameters(full) == PARAMETERS[name]


# The other sizes of a family differ in nothing but numbers, and all are cut to the same small ones here.
# Masked autoencoders are called with noise: see test_mae.py.
@pytest.mark.drawn
@pytest.mark.parametrize(
    "name", [name for name in list_models("*_tiny_*") if not name.startswith("mae_")]
)
def test_every_parameter_of_each_family_gets_a_gradient(name, key):
    config = small(model_config(name), depth=3)
    params = nnx.state(build_model(config, rngs=nnx.Rngs(key)))
    images = jax.random.normal(key, (2, 22, 15, 3))
    value, gradient = loss_and_gradient(config, params, images)
    assert np.isfinite(value) and value > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf != 0), f"{jax.tree_util.keystr(path)} gets no gradient"


def test_a_head_is_drawn_with_the_deviation_that_is_asked():
    """Fine-tuning at 448 px starts from a head of 2e-5."""
    sizes = {"image_size": 8, "patch_size": 4, "depth": 1}
    for name, std in itertools.product(("fastvim", "vit"), (0.02, 2e-5)):
        options = {"head_std": std, "rngs": nnx.Rngs(0), **sizes}
        model = create_model(f"{name}_tiny_patch16_224", **options)
        np.testing.assert_allclose(np.std(model.head.kernel[...]), std, rtol=0.02)
        assert not np.any(model.head.bias[...])


def test_a_vit_is_drawn_as_deit_is():
    """timm cuts a normal of 0.02 at ±2, a hundred deviations; cut at two deviations it would be 0.0176."""
    model = create_model("vit_tiny_patch16_224", depth=1, rngs=nnx.Rngs(0))
    block = jax.tree.map(lambda x: x[0], nnx.state(model.blocks))
    for layer in (block["attn"]["qkv"], block["mlp"]["fc1"], block["mlp"]["fc2"]):
        np.testing.assert_allclose(np.std(layer["kernel"][...]), 0.02, rtol=0.02)
    np.testing.assert_allclose(np.std(model.pos_embed[...]), 0.02, rtol=0.02)


def test_no_model_is_missing_from_the_counts():
    assert set(list_models()) == set(PARAMETERS)
    assert len(list_models("vit_*")) == 4 and set(list_models("vit_*")) < set(list_models("vit"))


def in_both_modes(run, config, params, images, **kwargs):
    """Call `run` with the scanned configuration and with the unrolled, rematerialised one."""
    unrolled = dataclasses.replace(config, blocks="unroll", remat="block")
    return (run(c, params, images, **kwargs) for c in (config, unrolled))


@pytest.mark.drawn
@pytest.mark.parametrize("options", MAMBA_OPTIONS, ids=str)
def test_every_option_runs_and_scan_equals_unroll(options, key):
    config = small(VisionMambaConfig(), drop_path=0.3, **options)
    params = nnx.state(build_model(config, rngs=nnx.Rngs(key)))
    images = jax.random.normal(key, (3, 24, 16, 3))
    scanned, unrolled = in_both_modes(forward, config, params, images, key=key)
    assert np.abs(scanned).max() > 0
    assert_close(scanned, unrolled, 2e-2 if config.dtype == "bfloat16" else 1e-5)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize(
    "options", [{}, {"pooling": "attention", "class_token": "middle"}], ids=str
)
def test_gradients_agree_between_modes(options, key):
    config = small(VisionMambaConfig(), drop_path=0.3, **options)
    params = nnx.state(build_model(config, rngs=nnx.Rngs(key)))
    images = jax.random.normal(key, (3, 24, 16, 3))
    scanned, unrolled = in_both_modes(loss_and_gradient, config, params, images, key=key)
    flat = jax.tree_util.tree_leaves_with_path
    for (path, a), (_, b) in zip(flat(scanned), flat(unrolled), strict=True):
        name = jax.tree_util.keystr(path)
        if (
            "'score']['bias'" in name
        ):  # a softmax ignores it, so that its gradient is nothing but rounding
            assert np.abs(a).max() < 1e-3 and np.abs(b).max() < 1e-3
        else:
            assert_close(a, b, 2e-5, name)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize(("pooling", "remat"), [("none", "dots"), ("mean", "block")])
def test_vit_options_agree_between_modes(pooling, remat, key):
    config = small(ViTConfig(), pooling=pooling, conv_width=4, drop_path=0.2, remat=remat)
    params = nnx.state(build_model(config, rngs=nnx.Rngs(key)))
    images = jax.random.normal(key, (2, 24, 16, 3))
    scanned, unrolled = in_both_modes(loss_and_gradient, config, params, images, key=key)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        assert_close(a, b, 2e-5)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize(
    "name", ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224", "vit_tiny_patch16_224"]
)
def test_any_size_at_call_time(name, key):
    config = small(model_config(name), depth=2)
    model = build_model(config, rngs=nnx.Rngs(key))
    run = nnx.jit(lambda model, images: model(images))
    for size in [(24, 16), (23, 13), (8, 36), (4, 4)]:
        assert run(model, jax.random.normal(key, (2, *size, 3))).shape == (2, 7)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("class_token", ["none", "middle"])
def test_dense_features_are_images_of_the_block_outputs(order, class_token, key):
    options = {"token_order": order, "class_token": class_token}
    config = small(VisionMambaConfig(), depth=4, out_indices=(0, 3), **options)
    model = build_model(config, rngs=nnx.Rngs(key))
    images = jax.random.normal(key, (2, 24, 16, 3))
    run = nnx.jit(lambda model, images: (model(images), model.intermediates(images)))
    features, intermediates = run(model, images)
    assert [f.shape for f in features] == [(2, 6, 4, 16)] * 2
    hidden = intermediates[3][1]
    if class_token == "middle":
        hidden = jnp.concatenate([hidden[:, :12], hidden[:, 13:]], axis=1)
    grid = hidden.reshape(2, *((6, 4) if order == "row" else (4, 6)), 16)
    if order == "column":
        grid = grid.swapaxes(1, 2)
    mean, var = grid.mean(-1, keepdims=True), grid.var(-1, keepdims=True)
    assert_close(features[1], (grid - mean) / jnp.sqrt(var + 1e-5), 1e-4)


@pytest.mark.drawn("more of the models", one_in=6)
def test_no_head_returns_the_pooled_features(key):
    model = build_model(small(VisionMambaConfig(), num_classes=0, depth=2), rngs=nnx.Rngs(key))
    images = jax.random.normal(key, (2, 24, 16, 3))
    np.testing.assert_array_equal(model(images), model.features(images))


@pytest.mark.drawn("more of the models", one_in=6)
def test_drop_path_differs_by_key_and_is_off_without_one(key):
    config = small(VisionMambaConfig(), depth=2, drop_path=0.5)
    graphdef, params = nnx.split(build_model(config, rngs=nnx.Rngs(key)))
    # So many that two keys do not happen to drop the same: of 4 and five blocks, they did once in 3,000 runs.
    images = jax.random.normal(key, (32, 24, 16, 3))
    run = jax.jit(lambda params, images, key: nnx.merge(graphdef, params)(images, key=key))
    first, again, other, off = (
        run(params, images, k) for k in (key, key, jax.random.fold_in(key, 1), None)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(off, forward(config, params, images))
    assert not np.allclose(first, off)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compute_dtype_is_that_of_the_products_operands(dtype, key):
    model = build_model(small(VisionMambaConfig(), dtype=dtype, depth=2), rngs=nnx.Rngs(key))
    images = jax.random.normal(key, (2, 24, 16, 3))
    residual, hidden = model.intermediates(images)[1]
    assert residual.dtype == jnp.float32 and hidden.dtype == jnp.float32
    assert model(images).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    program = jax.jit(lambda x: model(x)).lower(images).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    half = [line for line in products if "bf16>" in line]
    assert len(products) >= 10
    # All but the head's, and sums inside the scan.
    assert len(half) >= 10 if dtype == "bfloat16" else not half


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "men"}, "Did you mean 'mean'"),
        ({"image_size": 8}, "smaller than patch_size"),
        ({"image_size": "224"}, "image_size='224'"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"matmul_precision": "tf23"}, "Did you mean 'tf32'"),
        ({"pooling": "max", "pool_scale": 0.25}, "pool_scale=0.25 only acts"),
        ({"out_indices": (24,)}, "outside the model's blocks 0..23"),
        ({"dt_rank": 0}, "dt_rank=0"),
        ({"conv_width": -1}, "conv_width=-1"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        checked(VisionMambaConfig(), **options)


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'fastvim_tiny_patch16_224'"):
        create_model("fastvim_tini_patch16_224", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="Did you mean 'pooling'"):
        model_config("fastvim_tiny_patch16_224", poolin="mean")
    with pytest.raises(UserError, match="num_heads=5 does not divide"):
        model_config("vit_tiny_patch16_224", num_heads=5)


def test_bad_images_are_refused_with_the_shapes(key):
    model = build_model(small(VisionMambaConfig()), rngs=nnx.Rngs(key))
    with pytest.raises(UserError, match="4 channels .* built for 3"):
        model(jnp.ones((2, 24, 16, 4)))
    with pytest.raises(UserError, match="3x16 pixels is smaller than one 4x4 patch"):
        model(jnp.ones((2, 3, 16, 3)))

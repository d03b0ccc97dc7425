"""The API as people know it: seeds and keys, train and eval, timm's words, Flax's overview, one switch for speed."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import UserError
from fastvim_jax.models import create_model, model_config
from fastvim_jax.models.backbone import Backbone
from fastvim_jax.models.rngs import as_rngs
from fastvim_jax.serialise import from_dict, to_dict
from pallas_kernels import gpu
from pallas_kernels.mixer_core import add_to_residual
from tests.support import assert_close

SMALL = {"image_size": (8, 12), "patch_size": 4, "embed_dim": 8, "depth": 2, "num_classes": 3}
NAMES = ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224", "vit_tiny_patch16_224"]


def small(name=NAMES[0], **options):
    heads = {"num_heads": 2} if name.startswith("vit") else {}
    return create_model(name, **{**SMALL, **heads, "rngs": 0, **options})


def same(a, b):
    leaves = zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True)
    return all(bool((x == y).all()) for x, y in leaves)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return small(request.param)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 8, 12, 3))


@pytest.mark.drawn("more of the models", one_in=6)
def test_seeds_keys_and_rngs_are_one_source():
    models = [small(rngs=r) for r in (0, nnx.Rngs(0), jax.random.key(0))]
    assert all(same(models[0], other) for other in models[1:])
    assert not same(models[0], small(rngs=1))
    key = jax.random.PRNGKey(3)
    assert (as_rngs(key).params() == nnx.Rngs(jax.random.key(3)).params()).all()
    assert as_rngs(np.int64(5)).params() == nnx.Rngs(5).params()
    for bad in (True, 1.5, "0", None, jnp.ones(3)):
        with pytest.raises(UserError, match="must be an integer seed, a key"):
            as_rngs(bad)


def test_dtypes_may_be_objects():
    for dtype in (jnp.bfloat16, np.dtype("bfloat16"), "bfloat16"):
        assert model_config(NAMES[0], dtype=dtype, param_dtype=np.float32).dtype == "bfloat16"
    with pytest.raises(UserError, match="64-bit mode"):
        small(dtype=jnp.float64)


@pytest.mark.drawn("more of the models", one_in=6)
def test_train_and_eval_are_honoured(images, key):
    model = small(drop_path=0.9)
    off = jax.jit(model)(images)
    model.eval()
    np.testing.assert_array_equal(off, jax.jit(lambda x: model(x, key=key))(images))
    model.train()
    with pytest.raises(UserError, match="model is in training mode"):
        model(images)
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda key: nnx.merge(graphdef, params)(images, key=key))
    keys = jax.random.split(key, 8)
    assert any(not jnp.array_equal(off, run(k)) for k in keys)
    jax.eval_shape(model.features, images)  # drops nothing
    still = small()
    still.train()
    jax.eval_shape(still, images)  # with nothing to drop, no key is asked for


@pytest.mark.drawn("options of models")
def test_flax_s_overview(model, images):
    table = nnx.tabulate(model, images, console_kwargs={"width": 200, "force_terminal": False})
    assert "patch_embed" in table and "blocks" in table and "Total Parameters" in table


@pytest.mark.drawn("more of the models", one_in=6)
def test_features_then_head_is_the_model(model, images):
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 6 + (model.class_token is not None), 8)
    assert_close(model.forward_head(tokens), model(images), 1e-5)
    assert_close(model.forward_head(tokens, pre_logits=True), model.features(images), 1e-5)
    assert (model.num_features, model.num_classes) == (8, 3)


@pytest.mark.drawn("options of models")
def test_intermediate_layers_are_the_residual_stream(model, images):
    (last,) = model.get_intermediate_layers(images)
    streams = model.intermediates(images)
    first, again = model.get_intermediate_layers(images, (0, -1), reshape=True)
    assert first.shape == (2, 2, 3, 8)
    np.testing.assert_array_equal(again.reshape(2, 6, 8), last)
    # The stream after the first block is the one before the second, a class token aside.
    every = np.swapaxes(np.asarray(streams[1][0]), 0, 1)
    for token in np.swapaxes(np.asarray(first.reshape(2, 6, 8)), 0, 1):
        assert np.abs(every - token).max(axis=(1, 2)).min() < 1e-5
    normed, both = (model.get_intermediate_layers(images, norm=norm)[0] for norm in (True, False))
    assert not jnp.allclose(normed, both)
    with pytest.raises(UserError, match="0..1"):
        model.get_intermediate_layers(images, 3)


@pytest.mark.drawn("more of the models", one_in=6)
def test_the_class_token_comes_beside_where_there_is_one(images):
    for name in NAMES[1:]:
        model = small(name)
        ((tokens, token),) = model.get_intermediate_layers(
            images, return_prefix_tokens=True, norm=True
        )
        assert tokens.shape == (2, 6, 8)
        assert_close(token[:, 0], model.features(images), 1e-5)
    with pytest.raises(UserError, match="no class token"):
        small().get_intermediate_layers(images, return_prefix_tokens=True)


@pytest.mark.drawn("more of the models", one_in=6)
def test_a_new_head_leaves_the_rest(images):
    for name in NAMES:
        model = small(name)
        features = model.features(images)
        assert model.reset_classifier(5, rngs=1) is model
        assert model(images).shape == (2, 5) and model.num_classes == model.config.num_classes == 5
        np.testing.assert_array_equal(model.reset_classifier(0)(images), features)
        assert model.reset_classifier(2, rngs=1)(images).shape == (2, 2)
        nnx.split(model)
    assert small().reset_classifier(2, "last", rngs=0).config.head_pool == "last"
    with pytest.raises(UserError, match="build another model"):
        small(NAMES[2]).reset_classifier(2, "avg", rngs=0)
    with pytest.raises(UserError, match="rngs=None must be an integer seed"):
        small().reset_classifier(2)
    with pytest.raises(UserError, match="num_classes=-1"):
        small().reset_classifier(-1, rngs=0)


def test_a_new_head_understands_timm_s_pools():
    assert small().reset_classifier(2, "", rngs=0).config.head_pool == "all"
    assert small().reset_classifier(2, "avg", rngs=0).config.head_pool == "mean"


def test_blocks_and_masks_that_do_not_fit_are_refused(images):
    model = small(drop_path=0.5)
    assert len(model.get_intermediate_layers(images, np.int64(2))) == 2
    with pytest.raises(UserError, match="choose 1 to 2 last blocks"):
        model.get_intermediate_layers(images, 0)
    # The last one would drop the same images in all blocks.
    for shape in ((3, 2), (1, 2)):
        with pytest.raises(UserError, match=r"but must have \(2, 2\)"):
            model(images, drop_path_keep=jnp.ones(shape))


def test_dense_features_count_from_either_end(images):
    model = small(out_indices=(0, -1))
    assert model.config.out_indices == (0, 1)
    assert model.feature_info.channels() == [8, 8] and model.feature_info.reduction() == [4, 4]
    assert model.feature_info.module_name() == ["blocks.0", "blocks.1"]
    assert len(small().feature_info) == 2
    assert [f.shape for f in model(images)] == [(2, 2, 3, 8)] * 2
    for call in (model.features, model.forward_features):
        with pytest.raises(UserError, match="build it without out_indices"):
            call(images)


def test_timm_s_options_are_understood_or_explained():
    config = model_config(
        NAMES[0], in_chans=1, img_size=32, drop_path_rate=0.1, global_pool="avg", pretrained=False
    )
    assert (config.channels, config.image_size) == (1, (32, 32))
    assert (config.drop_path, config.head_pool) == (0.1, "mean")
    for options, message in (
        ({"pretrained": True}, "No weights are downloaded"),
        ({"features_only": True}, "out_indices"),
        ({"drop_rate": 0.1}, "no dropout"),
        ({"in_chans": 1, "channels": 1}, "the same option"),
        ({"channel": 1}, "Did you mean 'channels'"),
    ):
        with pytest.raises(UserError, match=message):
            model_config(NAMES[0], **options)


def test_one_switch_for_speed():
    config = model_config(NAMES[0], fast=True)
    assert (config.dtype, config.activations, config.blocks) == ("bfloat16", "compute", "unroll")
    assert not config.residual_in_fp32 and model_config(NAMES[0]).residual_in_fp32
    assert model_config(NAMES[0], fast=True, blocks="scan").blocks == "scan"
    vit = model_config(NAMES[2], fast=True)
    assert (vit.dtype, vit.blocks, vit.residual_in_fp32) == ("bfloat16", "unroll", False)


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_of_the_residual_stream(name, images):
    """Trace blocks in a loop and one by one; masks of drop path are float32, and so are logits."""
    for in_fp32, dtype in ((True, jnp.float32), (False, jnp.bfloat16)):
        for options in ({"blocks": "scan", "remat": "block", "depth": 6}, {"blocks": "unroll"}):
            model = small(
                name, dtype="bfloat16", residual_in_fp32=in_fp32, drop_path=0.5, **options
            )
            blocks = jax.eval_shape(model.intermediates, images)
            assert {residual.dtype for residual, _ in blocks} == {jnp.dtype(dtype)}
            run = lambda x, model=model: model(x, key=jax.random.key(0))  # noqa: E731
            assert jax.eval_shape(run, images).dtype == jnp.float32


def test_a_config_of_before_the_field_stores_the_residual_stream_in_float32():
    config = model_config(NAMES[0])
    text = to_dict(config)
    assert text.pop("residual_in_fp32")
    assert from_dict(type(config), text) == config


def test_sums_are_rounded_once(seed):
    """Compare with the definition; the norm of a block reads the sum that the next block reads."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    residual, update = draw(2, 3, 4).astype(jnp.bfloat16), draw(2, 3, 4)
    keep = jnp.asarray([0.0, 1.25])
    found = jax.jit(add_to_residual)(residual, update, keep)
    wanted = np.asarray(residual, np.float32) + np.asarray(update) * np.asarray(keep)[:, None, None]
    np.testing.assert_array_equal(found, wanted.astype(jnp.bfloat16))

    @jax.jit
    def read(residual, update):
        return add_to_residual(residual, update).astype(jnp.float32)

    total = np.asarray(read(residual, update))
    np.testing.assert_array_equal(total, total.astype(jnp.bfloat16).astype(np.float32))


def test_the_slow_default_is_told_once_on_a_gpu(images, monkeypatch, caplog):
    gpu.log_once.cache_clear()
    slow, fast = small(), small(dtype="bfloat16")
    trace = lambda model: jax.eval_shape(lambda x: model(x), images)  # noqa: E731  # traced anew
    with caplog.at_level(logging.WARNING, logger="pallas_kernels"):
        trace(slow)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        trace(fast)
        assert "fast=True" not in caplog.text
        trace(slow)
        trace(slow)
    assert caplog.text.count("fast=True") == 1


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fast", [False, True])
def test_strict_dtype_promotion(name, fast, images):
    model = small(name, fast=fast, dtype="bfloat16", blocks="scan", drop_path=0.1)
    with jax.numpy_dtype_promotion("strict"):
        for given in (images, images.astype(jnp.bfloat16)):
            jax.eval_shape(lambda x: model(x, key=jax.random.key(0)), given)
            assert jax.eval_shape(model, given).dtype == jnp.float32


@pytest.mark.parametrize(
    "options", [{"pooling": "attention"}, {"pooling": "max"}, {"unpool": "after_skip"}], ids=str
)
def test_strict_dtype_promotion_of_other_poolings(options, images):
    model = small(fast=True, blocks="scan", **options)
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(model, images).dtype == jnp.float32


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_empty_results(name):
    model = small(name)
    graphdef, params = nnx.split(model)
    nothing = jnp.ones((0, 8, 12, 3))

    @jax.jit
    def run(params):
        out, pull = jax.vjp(lambda p: nnx.merge(graphdef, p)(nothing), params)
        return out, pull(out)

    out, gradients = run(params)
    assert out.shape == (0, 3)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients))


def test_every_model_is_a_backbone():
    assert all(isinstance(small(name), Backbone) for name in NAMES)

"""Decay groups, layer-wise rates and AdamW, each against a definition written out here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.models import ViTConfig, build_model
from fastvim_jax.models.parameters import named_parameters, replace_parameters
from fastvim_jax.training.classification.train import make_draw, make_loss
from fastvim_jax.training.config import OptimizerConfig
from fastvim_jax.training.optimizer import (
    adamw,
    learning_rate_scales,
    make_optimizer,
    parameter_groups,
    weight_decay_mask,
)
from fastvim_jax.training.schedules import constant
from fastvim_jax.training.steps import init_state, make_train_step
from tests.support import assert_close, x64
from tests.training.tiny import tiny_batch, tiny_model

OPTIONS = {"class_token": "middle", "pooling": "attention", "layer_scale": 0.1, "depth": 3}
NOT_DECAYED = {"norm.scale", "post_norm.scale", "post_norm.bias", "D", "layer_scale", "bias"}


def params_of(config):
    """Return parameters of the right names and shapes, all zero: groups depend on nothing else, so nothing is drawn."""
    shapes = nnx.split(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))[1]
    return jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), shapes)


@pytest.fixture(scope="module")
def fastvim():
    return params_of(tiny_model(**OPTIONS))


@pytest.fixture(scope="module")
def vit():
    config = ViTConfig(
        image_size=8, patch_size=4, channels=1, num_classes=10, embed_dim=8, depth=2, num_heads=2
    )
    return params_of(config)


def spared(params, groups):
    return {n for n, group in parameter_groups(params, groups).items() if not group.decayed}


def test_supervised_groups_spare_vectors_and_biases(fastvim):
    names = set(named_parameters(fastvim))
    expected = {n for n in names if any(n == e or n.endswith("." + e) for e in NOT_DECAYED)}
    assert spared(fastvim, "supervised") == expected
    assert {"pos_embed", "class_token", "blocks.1.mixer.forward.A_log"} <= names - expected
    assert {"blocks.2.mixer.backward.D", "blocks.0.norm.scale", "head.bias"} <= expected


def test_other_groups(fastvim):
    supervised = spared(fastvim, "supervised")
    assert spared(fastvim, "cell") == supervised
    assert spared(fastvim, "finetune") == supervised | {"pos_embed", "class_token"}
    assert spared(fastvim, "pretrain") == set()


def test_groups_of_a_transformer(vit):
    flat = named_parameters(vit)
    vectors = {name for name, leaf in flat.items() if leaf.ndim == 1}
    assert spared(vit, "supervised") == vectors
    assert "blocks.0.norm1.scale" in vectors and "blocks.1.attn.qkv.kernel" not in vectors


@pytest.mark.parametrize("blocks", ["scan", "unroll"])
def test_masks_do_not_depend_on_how_blocks_run(fastvim, blocks):
    other = params_of(tiny_model(**OPTIONS, **{"blocks": blocks}))
    ours, theirs = weight_decay_mask(fastvim, "supervised"), weight_decay_mask(other, "supervised")
    assert jax.tree.leaves(ours) == jax.tree.leaves(theirs)
    assert parameter_groups(fastvim, "finetune", layer_decay=0.65) == parameter_groups(
        other, "finetune", layer_decay=0.65
    )


@pytest.mark.parametrize(
    ("depth", "rule"), [(1, "pairs"), (4, "pairs"), (5, "pairs"), (5, "blocks")]
)
def test_layer_scale_changes_every_two_blocks_or_at_every_block(depth, rule):
    params = params_of(tiny_model(depth=depth))
    decay, layers, each = 0.7, depth + 1, {"pairs": 2, "blocks": 1}[rule]
    options = {"layer_decay": decay, "layer_rule": rule}
    for name, group in parameter_groups(params, "finetune", **options).items():
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = 0 if name.startswith(("patch_embed.", "pos_embed")) else layers
        expected = decay ** np.ceil((layers - layer) / each)
        assert group.learning_rate_scale == pytest.approx(expected, rel=1e-12), name


def test_scales_of_stacked_leaves_are_vectors_over_depth(fastvim):
    scales = named_parameters(
        jax.tree.map(
            lambda p, s: jnp.broadcast_to(s, p.shape), fastvim, learning_rate_scales(fastvim, 0.5)
        )
    )
    first = [float(np.ravel(scales[f"blocks.{i}.mixer.in_proj.kernel"])[0]) for i in range(3)]
    assert first == [0.25, 0.5, 0.5]


def reference_adamw(flat, grads, rates, decays, groups, *, beta1, beta2, eps, clip):
    """Step as PyTorch writes AdamW: decay first, then the bias-corrected step; per parameter."""
    flat = dict(flat)
    first = {n: np.zeros_like(p) for n, p in flat.items()}
    second = {n: np.zeros_like(p) for n, p in flat.items()}
    for t, (grad, rate, decay) in enumerate(zip(grads, rates, decays, strict=True), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
        shrink = min(1.0, clip / norm)
        for name in flat:
            g, group = grad[name] * shrink, groups[name]
            lr = rate * group.learning_rate_scale
            p = flat[name] * (1 - lr * decay * group.decayed)
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g**2
            m, v = first[name] / (1 - beta1**t), second[name] / (1 - beta2**t)
            flat[name] = p - lr * m / (np.sqrt(v) + eps)
    return flat


@pytest.mark.drawn("trainings", one_in=6)
@pytest.mark.parametrize("clip", [1e9, 0.5])
def test_adamw_with_everything_equals_its_definition(fastvim, rng, clip):
    steps = 4
    rates, decays = rng.uniform(1e-3, 1e-2, steps), rng.uniform(0.1, 0.5, steps)
    flat = {n: rng.normal(size=p.shape) for n, p in named_parameters(fastvim).items()}
    grads = [{n: rng.normal(size=p.shape) for n, p in flat.items()} for _ in range(steps)]
    groups = parameter_groups(fastvim, "finetune", layer_decay=0.65)
    betas = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
    expected = reference_adamw(flat, grads, rates, decays, groups, **betas, clip=clip)
    with x64():
        wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), fastvim)
        params = replace_parameters(wide, flat)
        optimizer = adamw(
            params,
            learning_rate=lambda step: jnp.asarray(rates)[step],
            weight_decay=lambda step: jnp.asarray(decays)[step],
            groups="finetune",
            layer_decay=0.65,
            clip_grad_norm=clip,
            **betas,
        )
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for grad in grads:
            updates, state = update(replace_parameters(wide, grad), state, params)
            params = jax.tree.map(jnp.add, params, updates)
        for name, value in named_parameters(params).items():
            assert_close(value, expected[name], 1e-12, name)


def test_a_config_builds_what_it_says(fastvim, rng):
    layers = {"layer_decay": 0.5, "layer_rule": "blocks", "decay_groups": "finetune"}
    config = OptimizerConfig(weight_decay=0.3, beta1=0.0, beta2=0.0, **layers)
    optimizer = make_optimizer(config, fastvim, learning_rate=constant(0.5), total_steps=10)
    weights = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), fastvim)
    grads = jax.tree.map(jnp.ones_like, weights)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(weights), weights)
    params, changes = named_parameters(weights), named_parameters(updates)
    # With both betas zero Adam's step is the gradient's sign.
    np.testing.assert_allclose(changes["head.bias"], -0.5, rtol=1e-6)
    scales = {"head": 1.0} | {f"blocks.{i}.mixer.in_proj": 0.5 ** (3 - i) for i in range(3)}
    for layer, scale in scales.items():
        name = f"{layer}.kernel"
        wanted = -0.5 * scale * (1 + 0.3 * params[name])
        np.testing.assert_allclose(changes[name], wanted, rtol=1e-5)


@pytest.mark.drawn("trainings", one_in=6)
@pytest.mark.slow
def test_scanned_and_unrolled_models_take_the_same_steps(rng):
    config = tiny_model(depth=2, pooling="mean", pool_axes="columns")  # two rounds of the scan
    batches = [tiny_batch(rng) for _ in range(3)]
    with x64():
        ends = {}
        for blocks in ("scan", "unroll"):
            each = dataclasses.replace(
                config, blocks=blocks, dtype="float64", param_dtype="float64"
            )
            graphdef, params = nnx.split(build_model(each, rngs=nnx.Rngs(1)))
            optimizer = make_optimizer(
                OptimizerConfig(layer_decay=0.65, decay_groups="finetune"),
                params,
                learning_rate=constant(1e-3),
                total_steps=3,
            )
            state = init_state(params, optimizer)
            start = named_parameters(jax.tree.map(np.asarray, params))
            step = make_train_step(
                make_loss(graphdef, label_smoothing=0.1),
                optimizer,
                draw=make_draw(graphdef),
                ema_decay=0.9,
            )
            for batch in batches:
                batch = {**batch, "image": batch["image"].astype(np.float64)}
                state, _ = step(state, batch)
            ends[blocks] = named_parameters(state.params), named_parameters(state.ema)
        for scanned, unrolled in zip(ends["scan"], ends["unroll"], strict=True):
            for name, value in scanned.items():
                assert_close(value, unrolled[name], 1e-7, name)
        moved = ends["scan"][0]["blocks.1.mixer.in_proj.kernel"]
        assert np.abs(moved - start["blocks.1.mixer.in_proj.kernel"]).max() > 1e-4

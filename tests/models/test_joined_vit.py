"""ViTs whose residual sums and norms run as kernels: what they launch, and their values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.models import create_model, vit
from fastvim_jax.models.prepared import split_weights
from pallas_kernels import gpu
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)

pytestmark = needs_mosaic
SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2, "image_size": 64, "num_classes": 5}
TOKENS = 17


def build(name="vit_tiny_patch16_224", **options):
    return create_model(name, rngs=nnx.Rngs(0), **{**SMALL, "fast": True, **options})


def randomised(model, rng):
    """Move every parameter, since biases and shifts start at 0 and scales at 1."""
    graphdef, params = nnx.split(model)
    moved = lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)  # noqa: E731
    return graphdef, jax.tree.map(moved, params)


def value_and_gradients(graphdef, keep):
    """Return a function of parameters and images: the outputs, and the gradients of a sum of their sines."""

    def run(params, images):
        def objective(params, images):
            out = nnx.merge(graphdef, params)(images, drop_path_keep=keep)
            parts = jax.tree.leaves(out)
            return sum(jnp.mean(jnp.sin(part.astype("float32"))) for part in parts), out

        gradients, out = jax.grad(objective, (0, 1), has_aux=True)(params, images)
        return out, gradients

    return jax.jit(run)


def both(rng, **options):
    """Return the values and gradients of a model on kernels, which XLA replaces on this CPU, and without kernels."""
    graphdef, params = randomised(build(drop_path=0.2, **options), rng)
    images = jnp.asarray(rng.standard_normal((2, 64, 64, 3)), jnp.float32)
    keep = jnp.asarray(rng.choice([0.0, 1.0], (SMALL["depth"], 2, 2)), jnp.float32)
    with abstract_h100():
        traced = value_and_gradients(graphdef, keep).trace(params, images)
        on_kernels = traced.lower().compile()(params, images)
    with gpu.kernels_off():
        wanted = value_and_gradients(graphdef, keep)(params, images)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mixer_sum_norm" in text and "mixer_norm_gradient" in text
    return on_kernels, wanted


def worst(got, wanted) -> float:
    """Return the largest error of a gradient relative to the largest gradient of all, and of the outputs."""
    outputs, gradients = ([jax.tree.leaves(tree[i]) for tree in (got, wanted)] for i in (0, 1))
    scale = max(float(jnp.linalg.norm(x)) for x in gradients[1])
    apart = [float(jnp.linalg.norm(a - b)) / scale for a, b in zip(*gradients, strict=True)]
    return max(*apart, *relative_errors(*outputs))


@pytest.mark.drawn("joined ViTs", one_in=3)
@pytest.mark.parametrize(
    "options",
    [
        {"blocks": "unroll"},
        {"blocks": "scan", "depth": 2},
        {"qkv_bias": False, "head_pool": "mean"},
        {"out_indices": (0, 1), "blocks": "unroll"},
        {"pooling": "mean", "conv_width": 4},
        {"residual_in_fp32": True},
    ],
    ids=str,
)
def test_values_and_gradients(rng, options):
    """Compare with the same model without kernels, which rounds q, k, v and the branches elsewhere."""
    assert worst(*both(rng, **options)) < 4e-2


def test_padded_once_for_the_gradient(rng, monkeypatch):
    """Pad the odd number of tokens before all blocks: the padded token changes neither outputs nor gradients."""
    graphdef, params = randomised(build(blocks="unroll"), rng)
    images = jnp.asarray(rng.standard_normal((2, 64, 64, 3)), jnp.float32)
    found, texts = [], []
    for pads in (False, True):
        monkeypatch.setattr(vit, "pads_for_gradient", lambda *_, pads=pads: pads)
        with abstract_h100():
            traced = value_and_gradients(graphdef, None).trace(params, images)
        found.append(traced.lower().compile()(params, images))
        texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert [f"tensor<2x{TOKENS + 1}x64x" in text for text in texts] == [False, True]
    # Both compute with the same roundings.
    assert worst(found[1], found[0]) < 5e-3
    with abstract_h100():  # nothing is padded without a gradient
        forward = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
        text = jax.jit(forward).trace(params, images).lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<2x{TOKENS + 1}x64x" not in text


def test_masked_keys_have_no_gradient(rng):
    """Whatever the attention's gradient writes for padded keys, it is not read."""
    from fastvim_jax.layers.attention import _padded_keys

    x = jnp.asarray(rng.standard_normal((2, 6, 1, 4)), jnp.float32)
    _, pull = jax.vjp(lambda x: _padded_keys(1, x), x)
    (bar,) = pull(x.at[:, -1].set(jnp.nan))
    np.testing.assert_array_equal(bar, x.at[:, -1].set(0))


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ({}, True),
        ({"remat": "block"}, False),
        ({"activations": "wide"}, False),
        ({"embed_dim": 96}, False),
    ],
    ids=str,
)
def test_which_models_join(options, joined, monkeypatch):
    """Launch two kernels a block and one before all, and as many for the gradient, where all conditions hold."""
    graphdef, params = nnx.split(build(blocks="unroll", **options))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def counts():
        text = lower_for_h100(value_and_gradients(graphdef, None), params, images)
        return [launches(text, f"mixer_{name}") for name in ("sum_norm", "norm_gradient")]

    assert counts() == [(2 * SMALL["depth"] + 1) * joined] * 2
    if joined:
        monkeypatch.setenv("FASTVIM_KERNELS", "off")
        assert counts() == [0, 0]


def test_masked_autoencoder_joins():
    """The encoder's and the decoder's blocks are those of a ViT."""
    graphdef, params = nnx.split(
        create_model(
            "mae_vit_tiny_patch16_224", rngs=nnx.Rngs(0), fast=True, depth=2, decoder_depth=1,
            decoder_dim=64, decoder_heads=2, blocks="unroll",
        )
    )  # fmt: skip
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    noise = jax.ShapeDtypeStruct((2, 196), jnp.float32)

    def run(params, images, noise):
        return nnx.merge(graphdef, params)(images, noise=noise).predicted

    assert launches(lower_for_h100(run, params, images, noise), "mixer_sum_norm") == 2 * 3 + 2


def test_a_call_with_prepared_weights_computes_nothing_of_them(monkeypatch):
    """Take biases through proj once for all calls, though a gradient would pad the tokens."""
    monkeypatch.setattr(vit, "pads_for_gradient", lambda *_: True)
    graphdef, params = nnx.split(build(blocks="unroll"))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    with abstract_h100():
        split = split_weights(lambda params, x: nnx.merge(graphdef, params)(x), params, images)
        prepared = jax.eval_shape(split.prepare, params)
        call = jax.make_jaxpr(split.run)(prepared, images)
    results = [variable.aval.shape for eqn in call.eqns for variable in eqn.outvars]
    assert (2, TOKENS, 256) in results  # the MLPs are in sight
    of_weights = [
        variable.aval.shape
        for eqn in call.eqns
        if eqn.primitive.name in ("dot_general", "concatenate")
        for variable in eqn.outvars
        if variable.aval.shape[0] == SMALL["depth"] and len(variable.aval.shape) == 2
    ]
    assert of_weights == [(2, SMALL["num_classes"])]  # the head's product, of two images

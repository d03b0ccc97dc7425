"""The ends of a vision Mamba: one kernel embeds the patches, and the last block's normed tokens are used again."""

from __future__ import annotations

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.models import create_model, vision_mamba
from fastvim_jax.models.backbone import Backbone, Stream
from pallas_kernels.patch_embed import embed_patches
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)

pytestmark = needs_mosaic

SMALL = {
    "depth": 2,
    "embed_dim": 64,
    "image_size": (48, 192),
    "patch_size": (4, 16),
    "num_classes": 7,
    "dtype": "bfloat16",
    "activations": "compute",
}
NARROW = {"residual_in_fp32": False}


def split(seed=0, **options):
    model = create_model("fastvim_tiny_patch16_224", rngs=nnx.Rngs(seed), **SMALL | options)
    graphdef, params = nnx.split(model)
    draw = np.random.default_rng(seed)
    noise = lambda x: x + jnp.asarray(draw.standard_normal(x.shape), x.dtype) / 8  # noqa: E731
    return graphdef, jax.tree.map(noise, params)  # so that no bias is zero and no scale one


def images_of(seed, batch=88):
    return jax.random.normal(jax.random.key(seed), (batch, 48, 192, 3))


@pytest.fixture
def calls(monkeypatch):
    """List the shapes of images that the operation embeds."""
    found = []

    def watched(images, *args, **options):
        found.append(images.shape)
        return embed_patches(images, *args, **options)

    monkeypatch.setattr(vision_mamba, "embed_patches", watched)
    return found


def traced_for_h100(run, *args):
    with abstract_h100():
        return jax.jit(run).trace(*args).lower().compile()(*args)


@pytest.mark.parametrize("in_fp32", [True, False])
def test_equal_to_the_plain_model(seed, calls, in_fp32):
    """Compare logits and features. The program is traced for an H100 and run on this CPU."""
    graphdef, params = split(seed, residual_in_fp32=in_fp32)
    images = images_of(seed)

    def run(params, images):
        model = nnx.merge(graphdef, params)
        return model(images), model.features(images), model.forward_features(images)

    got = traced_for_h100(run, params, images)
    assert calls == [images.shape] * 3
    wanted = jax.jit(lambda *args: run(*args))(params, images)
    assert len(calls) == 3
    assert max(relative_errors(got, wanted)) < 2e-2


@pytest.mark.drawn
@pytest.mark.parametrize("blocks", ["unroll", "scan"])
def test_gradients_are_those_without_the_kernel(monkeypatch, blocks):
    """Expect the same operations in a training step, which embeds by XLA and normalises the residual stream."""
    graphdef, params = split(**NARROW, blocks=blocks, drop_path=0.5)
    images = images_of(0)

    def operations():
        def run(params, images):
            call = lambda p: nnx.merge(graphdef, p)(images, key=jax.random.key(0))  # noqa: E731
            out, pull = jax.vjp(call, params)
            return out, pull(jnp.cos(out))[0]

        lines = lower_for_h100(run, params, images).splitlines()
        return collections.Counter(re.sub(r"%[\w#:]+", "%", line).strip() for line in lines)

    got = operations()
    monkeypatch.setattr(vision_mamba, "embed_patches_unsupported", lambda *_, **__: "not now")
    monkeypatch.setattr(vision_mamba.VisionMamba, "_features", Backbone._features)
    assert got == operations()


def test_one_kernel_embeds_unless_a_gradient_is_asked_for():
    graphdef, params = split(**NARROW, depth=1)
    images = jax.ShapeDtypeStruct((88, 48, 192, 3), jnp.bfloat16)
    forward = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
    assert launches(lower_for_h100(forward, params, images), "patch_embed") == 1
    gradient = jax.grad(lambda *args: jnp.sum(forward(*args)))
    text = lower_for_h100(gradient, params, images)
    assert launches(text, "patch_embed") == 0
    assert launches(text, "mixer_back_project") == 1


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("options", "shape", "embeds"),
    [
        ({}, (88, 48, 192, 3), True),
        ({"pos_embed": False}, (88, 48, 192, 3), True),
        ({"blocks": "unroll", "head_pool": "max"}, (88, 48, 192, 3), True),
        ({"num_classes": 0}, (88, 64, 192, 3), True),  # another grid
        ({}, (88, 50, 192, 3), False),  # padded
        ({}, (89, 44, 192, 3), False),  # no multiple of 8 lines
        ({"patch_size": 4}, (88, 48, 48, 3), False),  # rows of 12 numbers
        ({"token_order": "column"}, (88, 48, 192, 3), False),
        ({"class_token": "middle"}, (88, 48, 192, 3), False),
        ({"remat": "block"}, (88, 48, 192, 3), False),
        ({"out_indices": (0,)}, (88, 48, 192, 3), False),
        ({"norm": "layer"}, (88, 48, 192, 3), False),
        ({"activations": "wide"}, (88, 48, 192, 3), False),
        ({"dtype": "float32", "activations": "wide"}, (88, 48, 192, 3), False),
        ({"scan_implementation": "xla"}, (88, 48, 192, 3), False),
    ],
)
def test_which_models_embed_by_the_kernel(monkeypatch, calls, options, shape, embeds):
    graphdef, params = split(**options)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    with abstract_h100():
        jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x), params, images)
        assert calls == [shape] * embeds
        monkeypatch.setenv("FASTVIM_KERNELS", "off")
        jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x), params, images)
    jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x), params, images)
    assert calls == [shape] * embeds


def test_the_last_norm_reads_the_last_block_s_tokens(seed):
    """Give tokens and normed ones that do not belong together, to see which of them the features come from."""
    rng = np.random.default_rng(seed)
    residual, normed = (jnp.asarray(rng.standard_normal((2, 5, 64)), "bfloat16") for _ in "ab")

    def features(stream, **options):
        graphdef, params = split(seed, **options)
        model = nnx.merge(graphdef, params)
        scale = np.asarray(model.norm.scale[...], np.float64)
        return model._features(stream), scale

    got, scale = features(Stream(residual, normed), **NARROW)
    assert got.dtype == jnp.float32
    wanted = np.mean(np.asarray(normed, np.float64), axis=1) * scale
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    for options in ({}, NARROW | {"head_pool": "last"}, NARROW | {"head_pool": "max"}):
        got, _ = features(Stream(residual, normed), **options)
        np.testing.assert_array_equal(got, features(Stream(residual), **options)[0])


@pytest.mark.parametrize("change", [(88, 48, 192, 4), (88, 3, 192, 3)])
def test_bad_images_are_refused_as_elsewhere(change):
    """Expect the message that models without the kernel give."""
    graphdef, params = split()
    images = jnp.zeros(change)

    def message():
        with pytest.raises(UserError) as error:
            jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x), params, images)
        return str(error.value)

    wanted = message()
    with abstract_h100():
        assert message() == wanted

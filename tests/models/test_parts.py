"""Blocks that run on parts of a batch give what they give on the whole batch, and gradients do not run in parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import create_model
from fastvim_jax.models import VisionMambaConfig, build_model, parts
from pallas_kernels import gpu
from tests.support import x64

SMALL = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 4, "num_classes": 3}
IMAGE = 4 * 4 * 8 * 8
"""Bytes of the widest array of one image: 4 tokens, 4 * 8 channels, float64."""
PARTS = "tensor<3x2x4x8xf64>"
"""Type of the tokens of six images in parts of two."""


@pytest.fixture
def one_core(monkeypatch):
    monkeypatch.setattr(parts, "program_cores", lambda: 1)


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_parts_give_what_the_whole_gives(rng, monkeypatch, one_core, pooling):
    config = VisionMambaConfig(**SMALL, pooling=pooling, dtype="float64", param_dtype="float64")
    with x64():
        graphdef, params = nnx.split(build_model(config, rngs=nnx.Rngs(0)))
        images = jnp.asarray(rng.normal(size=(6, 8, 8, 3)))
        forward = lambda images: nnx.merge(graphdef, params)(images)  # noqa: E731
        programs = []
        for cache in (2 * IMAGE, 6 * IMAGE):
            monkeypatch.setattr(parts, "CACHE", cache)
            programs.append(jax.jit(lambda images: forward(images)).lower(images))
        parted, whole = programs
        assert PARTS in parted.as_text() and PARTS not in whole.as_text()
        found, wanted = (program.compile()(images) for program in programs)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.drawn("more of the models", one_in=6)
def test_gradients_do_not_run_in_parts(rng, monkeypatch, one_core):
    options = SMALL | {"depth": 2, "pool_axes": "columns", "state_size": 4}
    config = VisionMambaConfig(**options, dtype="float64", param_dtype="float64")
    with x64():
        graphdef, params = nnx.split(build_model(config, rngs=nnx.Rngs(0)))
        images, weights = jnp.asarray(rng.normal(size=(6, 8, 8, 3))), rng.normal(size=(6, 3))

        def loss(params, images):
            return jnp.sum(weights * nnx.merge(graphdef, params)(images))

        programs = []
        for cache in (2 * IMAGE, 6 * IMAGE):
            monkeypatch.setattr(parts, "CACHE", cache)
            programs.append(jax.jit(jax.grad(lambda *args: loss(*args))).lower(params, images))
        assert PARTS not in programs[0].as_text()
        found, wanted = (program.compile()(params, images) for program in programs)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.drawn("more of the models", one_in=6)
def test_the_indices_of_a_masked_model_keep_its_batch_whole(monkeypatch, one_core):
    monkeypatch.setattr(parts, "CACHE", 1)
    options = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 4}
    model = create_model(
        "mae_fastvim_tiny_patch16_224", rngs=0, **options, decoder_dim=8, decoder_depth=1
    )
    graphdef, params = nnx.split(model)
    run = lambda params, images, noise: nnx.merge(graphdef, params)(images, noise=noise).predicted  # noqa: E731
    shape = jax.eval_shape(run, params, jnp.ones((2, 8, 8, 3)), jnp.ones((2, 4))).shape
    assert shape == (2, 4, 48)


@pytest.mark.parametrize(
    ("batch", "cores", "size"), [(16, 1, 2), (16, 4, 8), (7, 2, 1), (16, 0, 16)]
)
def test_parts_are_equal_and_fit_the_caches(monkeypatch, batch, cores, size):
    monkeypatch.setattr(parts, "program_cores", lambda: cores)
    assert parts.images_at_once(jnp.zeros((batch, 196, 192))) == size


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("name", ["fastvim", "vim", "vit"])
def test_a_symbolic_batch_is_one_part(one_core, name):
    """Keep a symbolic batch in one part, as in a program that a user exports with `jax.export`."""
    heads = {"num_heads": 2} if name == "vit" else {}
    model = create_model(f"{name}_tiny_patch16_224", rngs=0, **SMALL | {"depth": 2}, **heads)
    graphdef, params = nnx.split(model)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
    program = jax.export.export(jax.jit(lambda images: nnx.merge(graphdef, params)(images)))(images)
    assert program.out_avals[0].shape == (batch, 3)
    assert program.call(jnp.ones((3, 8, 8, 3))).shape == (3, 3)


def test_programs_for_other_devices_have_no_parts(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert parts.program_cores() > 0
    with gpu.kernels_off():  # a portable program
        assert parts.program_cores() == 0
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert parts.program_cores() == 0
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert parts.program_cores() == 0

"""Forward-mode products of whole models, against the Jacobian by reverse mode, and the advice where there are none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import create_model, jvp
from tests.support import assert_close, x64

SMALL = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2}
MODELS = {
    "fastvim_tiny_patch16_224": {"num_classes": 3, "state_size": 4},
    "vim_tiny_patch16_224": {"num_classes": 3, "state_size": 4},
    "vit_tiny_patch16_224": {"num_classes": 3, "num_heads": 2},
    "mae_fastvim_tiny_patch16_224": {"decoder_dim": 8, "decoder_depth": 1, "state_size": 4},
}


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize("name", MODELS)
def test_products_with_the_jacobian(name, rng, monkeypatch):
    monkeypatch.setenv("FASTVIM_KERNELS", "off")
    with x64():
        wide = {"dtype": "float64", "param_dtype": "float64"}
        model = create_model(name, rngs=nnx.Rngs(0), **SMALL, **MODELS[name], **wide)
        noise = jnp.asarray(rng.random((1, 4)))

        def run(images):
            if not name.startswith("mae"):
                return model(images)
            return model(images, noise=noise).predicted.reshape(1, -1)[:, :3]

        images, direction = (jnp.asarray(rng.standard_normal((1, 8, 8, 3))) for _ in range(2))

        @jax.jit
        def products(images, direction):
            value, along = jvp(run, (images,), (direction,))
            return value, along, jax.jacrev(run)(images), run(images)

        value, along, jacobian, wanted = products(images, direction)
        assert_close(value, wanted, 1e-12)
        assert_close(along, jnp.tensordot(jacobian, direction, axes=4), 1e-10)
        assert np.abs(along).max() > 1e-6


@pytest.mark.parametrize("activations", ["wide", "compute"])
def test_forward_mode_is_refused_with_what_has_it(activations):
    options = {**SMALL, "state_size": 4, "activations": activations}
    model = create_model("fastvim_tiny_patch16_224", num_classes=3, rngs=nnx.Rngs(0), **options)
    images = jnp.ones((1, 8, 8, 3))
    with pytest.raises(TypeError, match=r"use .*fastvim_jax\.jvp"):
        jax.jvp(model, (images,), (images,))

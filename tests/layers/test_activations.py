"""activations="compute": rounded once and stored narrow, but the same function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.layers.linear import linear
from fastvim_jax.models import create_model
from fastvim_jax.precision import Precision


def test_results_are_stored_in_the_compute_dtype(seed):
    layer = nnx.Linear(8, 6, rngs=nnx.Rngs(seed))
    x = jax.random.normal(jax.random.key(seed), (3, 8))
    narrow = linear(layer, x, Precision("bfloat16", activations="compute"))
    assert narrow.dtype == jnp.bfloat16
    assert linear(layer, x, Precision("bfloat16")).dtype == jnp.float32
    exact = linear(layer, x, Precision())
    assert float(jnp.max(jnp.abs(narrow - exact))) < 0.05 * float(jnp.max(jnp.abs(exact)))


@pytest.mark.parametrize("name", ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224"])
def test_a_model_stays_close_to_float32(seed, name):
    options = {"depth": 2, "embed_dim": 32, "image_size": 32, "patch_size": 8, "num_classes": 5}
    images = jax.random.normal(jax.random.key(seed), (2, 32, 32, 3))

    def logits(**policy):
        model = create_model(name, rngs=nnx.Rngs(seed), **options, **policy)
        graphdef, params = nnx.split(model)
        return jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, images)

    exact, narrow = logits(), logits(dtype="bfloat16", activations="compute")
    assert narrow.dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(narrow - exact))) < 0.03 * float(jnp.max(jnp.abs(exact)))


def test_unknown_choice():
    with pytest.raises(UserError, match="activations"):
        Precision("bfloat16", activations="narrow")

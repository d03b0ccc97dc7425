"""activations="compute": rounded once and stored narrow, but the same function."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.layers.linear import linear
from fastvim_jax.layers.patch_embed import PatchEmbed
from fastvim_jax.models import create_model
from fastvim_jax.precision import Precision
from tests.support import checked


def test_results_are_stored_in_the_compute_dtype(seed):
    layer = nnx.Linear(8, 6, rngs=nnx.Rngs(seed))
    x = jax.random.normal(jax.random.key(seed), (3, 8))
    narrow = linear(layer, x, Precision("bfloat16", activations="compute"))
    assert narrow.dtype == jnp.bfloat16
    assert linear(layer, x, Precision("bfloat16")).dtype == jnp.float32
    exact = linear(layer, x, Precision())
    assert float(jnp.max(jnp.abs(narrow - exact))) < 0.05 * float(jnp.max(jnp.abs(exact)))


@pytest.mark.drawn("options of models")
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


@pytest.mark.parametrize(("activations", "terms"), [("compute", 1), ("wide", 2)])
def test_images_are_rounded_once(seed, activations, terms):
    """Find the patches in the product as one array of 8 bits of mantissa, or as two."""
    precision = Precision("bfloat16", activations=activations)
    embed = PatchEmbed((4, 4), 3, 16, precision=precision, rngs=nnx.Rngs(seed))
    images = jax.random.normal(jax.random.key(seed), (2, 8, 8, 3))
    (product,) = re.findall(r"dot_general .*", jax.jit(embed).lower(images).as_text())
    assert f"tensor<2x2x2x{48 * terms}xbf16>" in product
    exact = PatchEmbed((4, 4), 3, 16, precision=Precision(), rngs=nnx.Rngs(seed))(images)
    narrow = embed(images)
    assert narrow.dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(narrow - exact))) < 0.02 * float(jnp.max(jnp.abs(exact)))


def test_unknown_choice():
    with pytest.raises(UserError, match="activations"):
        checked(Precision("bfloat16"), activations="narrow")

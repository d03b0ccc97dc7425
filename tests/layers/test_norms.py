"""Norms keep their input alone for the gradient, and change no value by that."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.layers.norms import checkpointed_norm, make_norm
from fastvim_jax.precision import Precision
from tests.pallas_kernels.mosaic_support import relative_errors


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_only_the_input_is_kept(key, kind):
    norm = make_norm(kind, 24, eps=1e-5, precision=Precision(), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(norm)
    x, out_bar = jax.random.normal(key, (2, 3, 7, 24))

    def run(call):
        out, pull = jax.vjp(lambda p, x: call(nnx.merge(graphdef, p), x), params, x)
        kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.shape(leaf) == x.shape]
        return len(kept), (out, pull(out_bar))

    (one, got), (many, wanted) = run(checkpointed_norm), run(lambda norm, x: norm(x))
    assert one == 1 < many
    assert max(relative_errors(got, wanted)) < 1e-6

"""A position table added to tokens: the sum, and the gradient that a product adds up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.layers.pos_embed import add_table
from tests.support import relative_error, x64


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6)])
def test_gradients_are_those_of_a_sum(rng, dtype, tolerance):
    b, l, d = rng.integers(1, [12, 40, 24])
    tokens, table, weights = (rng.standard_normal((n, l, d)) for n in (b, 1, b))
    with x64():
        arrays = [jnp.asarray(a, dtype) for a in (tokens, table)]
        out, pull = jax.vjp(add_table, *arrays)
        to_tokens, to_table = pull(jnp.asarray(weights, dtype))
        assert {a.dtype for a in (out, to_tokens, to_table)} == {np.dtype(dtype)}
        assert relative_error(out, tokens + table) < tolerance
        assert relative_error(to_tokens, weights) < tolerance
        assert relative_error(to_table, weights.sum(0, keepdims=True)) < tolerance


def test_no_reduction_over_the_batch_is_left():
    """Find no reduction over the batch. It would make XLA lay the tokens out with the batch innermost."""
    tokens, table = jnp.ones((16, 9, 8)), jnp.ones((1, 9, 8))
    step = jax.jit(jax.grad(lambda table: jnp.sum(jnp.sin(add_table(tokens, table)))))
    lowered = step.lower(table).as_text()
    assert "dot_general" in lowered
    assert "stablehlo.reduce" not in lowered

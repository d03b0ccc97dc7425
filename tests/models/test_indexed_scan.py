"""The loop over periods of stacked blocks: values, gradients, and what it keeps for the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from fastvim_jax.models.indexed_scan import indexed_scan

DEPTH, WIDTH = 6, 5


def step(j, params, keep, carry):
    x, total = carry
    weight = jnp.tanh(params["weight"])  # the gradient reads it, and it depends on no token
    factor = 1.0 if keep is None else keep
    hidden = jnp.sin(x @ weight + params["bias"]) * (j + 1)
    return hidden, total + factor * (hidden * x)


def unrolled(stacked, keep, carry, period):
    for i in range(DEPTH):
        params, factor = jax.tree.map(lambda leaf: leaf[i], (stacked, keep))  # noqa: B023
        carry = step(i % period, params, factor, carry)
    return carry


@pytest.fixture(scope="module")
def arrays():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    stacked = {"weight": normal(DEPTH, WIDTH, WIDTH), "bias": normal(DEPTH, WIDTH)}
    return stacked, normal(DEPTH, 3, 1), (normal(3, WIDTH), normal(3, WIDTH))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_values_and_gradients_are_those_of_the_written_out_blocks(arrays, period, kept):
    stacked, keep, carry = arrays
    keep = keep if kept else None

    def loss(run):
        def of(stacked, carry):
            last = run(stacked, keep, carry, period)
            return sum(jnp.sum(jnp.cos(x)) for x in last), last

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))(stacked, carry)

    (_, last), gradient = loss(lambda *args: indexed_scan(step, *args))
    (_, wanted), expected = loss(unrolled)
    plain = jax.jit(lambda *args: indexed_scan(step, *args, period))(stacked, keep, carry)
    for got, want in ((last, wanted), (plain, wanted), (gradient, expected)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert jnp.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(gradient))


def test_no_parameter_is_saved_and_no_array_twice(arrays):
    stacked, keep, carry = arrays
    _, pull = jax.vjp(lambda *args: indexed_scan(step, args[0], keep, args[1], 2), stacked, carry)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(pull) if leaf.ndim > 1)
    given = [leaf.shape for leaf in jax.tree.leaves((stacked, keep))]
    # Of each of a period's two blocks: its input, the argument of sin, and its result, which is the next one's input.
    saved = [(DEPTH // 2, 3, WIDTH)] * 5
    for shape in given:
        shapes.remove(shape)
    assert shapes == saved

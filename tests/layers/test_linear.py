"""Products with half-precision operands: how close they are, forwards and backwards, and what they are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.layers.linear import product
from fastvim_jax.layers.pooling import max_by_argmax
from tests.support import assert_close

HIGHEST = jax.lax.Precision.HIGHEST


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw tokens, a kernel that bfloat16 holds exactly, and weights of the result."""
    x = rng.standard_normal((2, 9, 24)).astype(np.float32)
    kernel = np.asarray(jnp.asarray(rng.standard_normal((24, 7)), jnp.bfloat16), np.float32)
    return x, kernel, rng.standard_normal((2, 9, 7)).astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"), [("bfloat16", 5e-5, 1e-2), ("float32", 1e-6, 1e-6)]
)
def test_product_is_close_and_wide(dtype: str, forward: float, backward: float, rng) -> None:
    x, kernel, weights = draw(rng)

    @jax.jit
    def run(x, kernel):
        y, pullback = jax.vjp(lambda x, k: product(x, k, jnp.dtype(dtype), HIGHEST), x, kernel)
        return y, pullback(jnp.asarray(weights))

    y, (to_x, to_kernel) = run(x, kernel)
    assert {y.dtype, to_x.dtype, to_kernel.dtype} == {jnp.dtype("float32")}
    wide = [a.astype(np.float64) for a in (x, kernel, weights)]
    assert_close(y, wide[0] @ wide[1], forward)
    assert_close(to_x, wide[2] @ wide[1].T, backward)
    assert_close(to_kernel, np.einsum("bli,blo->io", wide[0], wide[2]), backward)


def test_tokens_rounded_once_would_be_far_off(rng) -> None:
    x, kernel, _ = draw(rng)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(rounded @ kernel, x.astype(np.float64) @ kernel, 5e-5)


def test_gradients_have_the_dtypes_of_what_they_belong_to(rng) -> None:
    x, kernel, _ = draw(rng)
    half = jnp.asarray(x, jnp.bfloat16)
    operands = jnp.dtype("bfloat16")
    to_x, to_kernel = jax.grad(lambda x, k: product(x, k, operands, HIGHEST).sum(), argnums=(0, 1))(
        half, jnp.asarray(kernel)
    )
    assert to_x.dtype == jnp.bfloat16 and to_kernel.dtype == jnp.float32


def test_max_by_argmax_gives_its_gradient_to_the_first_of_equals() -> None:
    x = jnp.array([[1.0, 3.0, 3.0], [-2.0, -5.0, -2.0]])
    y, pullback = jax.vjp(lambda x: max_by_argmax(x, axis=1), x)
    np.testing.assert_array_equal(y, [3.0, -2.0])
    np.testing.assert_array_equal(pullback(jnp.array([2.0, 7.0]))[0], [[0, 2, 0], [7, 0, 0]])

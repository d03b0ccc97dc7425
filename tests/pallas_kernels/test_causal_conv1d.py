"""The causal convolution against the NumPy loop in float64, and what it says about wrong arguments."""

from __future__ import annotations

import contextlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import causal_conv1d
from pallas_kernels.causal_conv1d.arg_specs import SMALL, ConvSpec
from tests.pallas_kernels import oracle
from tests.support import DRAWS, assert_close, relative_error, x64

IMPLEMENTATIONS = ("reference", "xla", "auto")
TOLERANCE = {"float64": (1e-12, 1e-12), "float32": (5e-6, 5e-5)}


def check(spec: ConvSpec, implementation: str, dtype: str, seed: int) -> None:
    arrays, options = spec.arguments(seed)
    exact = {k: np.asarray(x, np.float64) for k, x in arrays.items()}
    y = oracle.conv(exact, **options)
    y_bar = np.random.default_rng(seed).normal(size=y.shape).astype(np.float32).astype(np.float64)
    bars = oracle.conv_gradients(exact, y_bar, **options)

    def objective(arrays):
        y = causal_conv1d(**arrays, **options, implementation=implementation)
        return jnp.sum(y * y_bar.astype(dtype)), y

    with x64() if dtype == "float64" else contextlib.nullcontext():
        cast = {k: jnp.asarray(x, dtype) for k, x in exact.items()}
        (_, actual), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(cast)
        assert actual.dtype == dtype
    assert_close(actual, y, TOLERANCE[dtype][0])
    for name, bar in bars.items():
        assert_close(gradients[name], bar, TOLERANCE[dtype][1], f"gradient of {name}")


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_oracle_gradients_are_the_slopes_of_the_oracle(spec: ConvSpec, seed: int):
    arrays, options = spec.arguments(seed)
    arrays = {k: np.asarray(x, np.float64) for k, x in arrays.items()}
    y_bar = np.random.default_rng(seed).normal(size=arrays["x"].shape)
    bars = oracle.conv_gradients(arrays, y_bar, **options)
    slope, expected = oracle.finite_difference(
        lambda a: np.sum(oracle.conv(a, **options) * y_bar), arrays, bars, seed
    )
    assert slope == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_specs(spec: ConvSpec, implementation: str, dtype: str, seed: int):
    check(spec, implementation, dtype, seed)


@pytest.mark.drawn("more of the kernels", one_in=6)
@settings(max_examples=8 * DRAWS, derandomize=False)
@given(
    spec=st.builds(
        ConvSpec,
        batch=st.integers(1, 3),
        length=st.integers(1, 12),
        channels=st.integers(1, 9),
        width=st.integers(1, 6),
        bias=st.booleans(),
        activation=st.sampled_from(["silu", None]),
        reverse=st.booleans(),
    ),
    seed=st.integers(0, 2**31 - 1),
)
def test_random_shapes_and_options(spec: ConvSpec, seed: int):
    check(spec, "xla", "float64", seed)


def test_reverse_is_forward_of_the_flipped(seed: int):
    arrays, _ = ConvSpec(2, 9, 3).arguments(seed)
    y = causal_conv1d(**arrays, reverse=True)
    flipped = causal_conv1d(**oracle.flipped(arrays, ("x",)))
    assert_close(y, flipped[:, ::-1], 1e-6)
    assert relative_error(y, flipped) > 1e-2, "direction makes no difference"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_sums_in_float32(implementation: str, seed: int):
    arrays, options = ConvSpec(2, 30, 5, width=8).arguments(seed, jnp.bfloat16)
    y = causal_conv1d(**arrays, **options, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    exact = {k: np.asarray(x.astype(jnp.float32), np.float64) for k, x in arrays.items()}
    assert_close(y.astype(jnp.float32), oracle.conv(exact, **options), 4e-3)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        ({"x": (2, 3)}, {}, ValueError, r"x must have 3 dimensions \(b l e\), got shape \(2, 3\)"),
        (
            {"kernel": (4, 6)},
            {},
            ValueError,
            r"kernel must have shape \(width >= 1, 5\).*got \(4, 6\)",
        ),
        ({"kernel": (0, 5)}, {}, ValueError, r"kernel must have shape \(width >= 1, 5\)"),
        ({"bias": (4,)}, {}, ValueError, r"bias must have shape \(5,\) \(e\).*got \(4,\)"),
        ({}, {"activation": "relu"}, ValueError, "activation must be 'silu' or None, got 'relu'"),
        ({}, {"implementation": "fast"}, ValueError, "'auto', 'xla', .*; got 'fast'"),
    ],
)
def test_wrong_arguments(shapes, options, error, message: str):
    given_shapes = {"x": (2, 3, 5), "kernel": (4, 5)} | shapes
    arrays = {k: jnp.ones(s) for k, s in given_shapes.items()}
    # The suite's own shape checks sit around the function and would speak first.
    with pytest.raises(error, match=message):
        inspect.unwrap(causal_conv1d)(**arrays, **options)

"""Values and gradients of every implementation of the scan, against the NumPy loop in float64."""

from __future__ import annotations

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import selective_scan
from pallas_kernels.selective_scan import xla_associative
from pallas_kernels.selective_scan.arg_specs import SMALL, ScanSpec
from pallas_kernels.selective_scan.chunks import chunk_length
from tests.pallas_kernels import oracle
from tests.support import DRAWS, assert_close, relative_error, x64

XLA = ("xla_associative", "xla_sequential")
IMPLEMENTATIONS = ("reference", *XLA, "auto")
TOLERANCE = {"float64": (1e-9, 1e-8), "float32": (5e-5, 5e-4)}


def value_and_gradients(arrays, y_bar, last_bar, options, implementation):
    def objective(arrays):
        y, last = selective_scan(
            **arrays, **options, return_last_state=True, implementation=implementation
        )
        return jnp.sum(y * y_bar) + jnp.sum(last * last_bar), (y, last)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(arrays)
    return outputs, gradients


def check(arrays, options, implementation: str, dtype: str, seed: int) -> None:
    """Compare outputs, last state and all gradients, of arrays that float32 holds exactly."""
    r = np.random.default_rng(seed)
    exact = {k: np.asarray(x, np.float64) for k, x in arrays.items()}
    y, last = oracle.scan(exact, **options)
    y_bar = r.normal(size=y.shape).astype(np.float32).astype(np.float64)
    last_bar = r.normal(size=last.shape).astype(np.float32).astype(np.float64)
    bars = oracle.scan_gradients(exact, y_bar, last_bar, **options)
    with x64() if dtype == "float64" else contextlib.nullcontext():
        given = {k: jnp.asarray(x, dtype) for k, x in exact.items()}
        outputs, gradients = value_and_gradients(
            given, jnp.asarray(y_bar, dtype), jnp.asarray(last_bar, dtype), options, implementation
        )
        assert outputs[0].dtype == outputs[1].dtype == dtype
        assert {k: g.dtype for k, g in gradients.items()} == {k: x.dtype for k, x in given.items()}
    value, gradient = TOLERANCE[dtype]
    assert_close(outputs[0], y, value, "y")
    assert_close(outputs[1], last, value, "last_state")
    for name, bar in bars.items():
        # A gradient that is zero (length 1: nothing decays but the zero state) is compared as it is.
        assert_close(gradients[name], bar, gradient, f"gradient of {name}")


@pytest.mark.drawn
@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_oracle_gradients_are_the_slopes_of_the_oracle(spec: ScanSpec, seed: int):
    arrays, options = spec.arguments(seed)
    arrays = {k: np.asarray(x, np.float64) for k, x in arrays.items()}
    r = np.random.default_rng(seed)
    y, last = oracle.scan(arrays, **options)
    y_bar, last_bar = r.normal(size=y.shape), r.normal(size=last.shape)

    def objective(arrays):
        y, last = oracle.scan(arrays, **options)
        return np.sum(y * y_bar) + np.sum(last * last_bar)

    bars = oracle.scan_gradients(arrays, y_bar, last_bar, **options)
    slope, expected = oracle.finite_difference(objective, arrays, bars, seed)
    assert slope == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.drawn
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_specs(spec: ScanSpec, implementation: str, dtype: str, seed: int):
    check(*spec.arguments(seed), implementation, dtype, seed)


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_reference_and_choice(implementation: str, dtype: str, seed: int):
    spec = ScanSpec(2, 67, 4, states=3, groups=2, z=True, reverse=True)
    check(*spec.arguments(seed), implementation, dtype, seed)


@st.composite
def specs(draw) -> ScanSpec:
    groups = draw(st.sampled_from([None, None, 1, 2, 3]))
    flag = st.booleans()
    return ScanSpec(
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 20) | st.integers(60, 140)),
        channels=draw(st.integers(1, 4)) * (groups or 1),
        states=draw(st.integers(1, 17)),
        groups=groups,
        D=draw(flag),
        z=draw(flag),
        delta_bias=draw(flag),
        delta_softplus=draw(flag),
        reverse=draw(flag),
    )


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize("implementation", XLA)
@settings(max_examples=5 * DRAWS, derandomize=False)
@given(spec=specs(), seed=st.integers(0, 2**31 - 1))
def test_random_shapes_and_options(implementation: str, spec: ScanSpec, seed: int):
    arrays, options = spec.arguments(seed)
    check(arrays, options, implementation, "float64", seed)


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize(
    ("length", "reverse"), [(128, False), (129, True), (200, True), (250, False), (321, True)]
)
def test_associative_runs_of_several_chunks(monkeypatch, length: int, reverse: bool, seed: int):
    """Scan runs of two chunks: one run, two runs whose last is half empty, full, or padded, and three."""
    spec = ScanSpec(2, length, 3, states=4, z=True, reverse=reverse)
    monkeypatch.setattr(xla_associative, "RUN_STATES", 2 * chunk_length(length) * 2 * 3 * 4)
    check(*spec.arguments(seed), "xla_associative", "float64", seed)


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reverse_is_forward_of_the_flipped(implementation: str, seed: int):
    arrays, _ = ScanSpec(2, 70, 5, states=4, z=True).arguments(seed)
    run = functools.partial(selective_scan, return_last_state=True, implementation=implementation)
    y, last = run(**arrays, reverse=True)
    y_flipped, last_flipped = run(**oracle.flipped(arrays, oracle.SEQUENCES))
    assert_close(y, y_flipped[:, ::-1], 1e-6)
    assert_close(last, last_flipped, 1e-6)
    assert relative_error(y, y_flipped) > 1e-2, "direction makes no difference"


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("raw", [-2e4, 60.0, 2e4])
def test_extreme_steps(implementation: str, raw: float, seed: int):
    """Compare steps that round to zero, and steps whose decay underflows: finite, and equal to the loop."""
    arrays, options = ScanSpec(2, 9, 4, states=3, z=True).arguments(seed)
    arrays["delta"] = arrays["delta"].at[:, ::3].set(raw)
    check(arrays, options, implementation, "float32", seed)


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str, seed: int):
    """Keep the state in float32: only the inputs, which the oracle sees too, and the output are rounded."""
    arrays, options = ScanSpec(2, 80, 6, z=True).arguments(seed, jnp.bfloat16)
    y, last = selective_scan(
        **arrays, **options, return_last_state=True, implementation=implementation
    )
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    exact = {k: np.asarray(x.astype(jnp.float32), np.float64) for k, x in arrays.items()}
    expected, expected_last = oracle.scan(exact, **options)
    assert_close(y.astype(jnp.float32), expected, 4e-3)
    assert_close(last, expected_last, 1e-5)
    gradients = jax.grad(
        lambda a: jnp.sum(
            selective_scan(**a, **options, implementation=implementation).astype(jnp.float32)
        )
    )(arrays)
    bars = oracle.scan_gradients(exact, np.ones(y.shape), np.zeros(last.shape), **options)
    for name, bar in bars.items():
        assert gradients[name].dtype == arrays[name].dtype
        assert_close(gradients[name].astype(jnp.float32), bar, 1e-2, name)


def test_one_group_equals_no_groups(seed: int):
    arrays, _ = ScanSpec(2, 5, 4, states=3).arguments(seed)
    grouped = {k: x[:, :, None] if k in "BC" else x for k, x in arrays.items()}
    np.testing.assert_array_equal(selective_scan(**arrays), selective_scan(**grouped))


@pytest.mark.parametrize(
    "length", [1, 7, 14, 64, 65, 127, 196, 197, 1024, 4096, 5000, 16384, 65536]
)
def test_chunks_cover_the_sequence_with_little_padding(length: int):
    chunk = chunk_length(length)
    chunks = -(-length // chunk)
    assert length <= chunks * chunk < length + chunks
    assert chunk <= max(64, length**0.5) and (chunks == 1) == (length <= 64)


def test_lists_are_arrays():
    u, A, B = jnp.ones((1, 3, 2)), -jnp.ones((2, 4)), jnp.ones((1, 3, 4))
    scan = inspect.unwrap(selective_scan)  # without the tests' check of annotations
    listed = [np.asarray(x).tolist() for x in (u, u, A, B, B)]
    np.testing.assert_array_equal(scan(*listed), scan(u, u, A, B, B))

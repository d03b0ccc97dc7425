"""The scan under JAX's transformations, its memory, and what it says about wrong arguments."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu, selective_scan
from pallas_kernels.selective_scan import implementations, xla_sequential
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from tests.pallas_kernels.mosaic_support import abstract_h100, needs_mosaic, relative_errors
from tests.support import assert_close

XLA = ("xla_associative", "xla_sequential", "auto")


def objective(arrays, options, implementation):
    return jnp.sum(jnp.sin(selective_scan(**arrays, **options, implementation=implementation)))


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize("implementation", XLA)
def test_vmap_of_gradients(implementation: str, seed: int):
    spec = ScanSpec(2, 70, 3, states=4, z=True, reverse=True)
    cases = [spec.arguments(seed + i)[0] for i in range(3)]
    options = spec.arguments(seed)[1]
    gradient = jax.grad(lambda a: objective(a, options, implementation))
    stacked = jax.jit(jax.vmap(gradient))(jax.tree.map(lambda *x: jnp.stack(x), *cases))
    for i, case in enumerate(cases):
        expected = jax.grad(lambda a: objective(a, options, "reference"))(case)
        for name in case:
            assert_close(stacked[name][i], expected[name], 5e-4, name)


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize("implementation", XLA)
def test_blocks_under_scan_and_checkpoint(implementation: str, seed: int):
    """Compare a scan over four layers with rematerialisation with the gradients of a loop without."""
    arrays, options = ScanSpec(2, 12, 4, states=3).arguments(seed)
    u = arrays.pop("u")
    layers = jax.tree.map(lambda x: jnp.stack([x * s for s in (0.5, 0.8, 1.0, 1.1)]), arrays)

    def block(u, layer, implementation):
        return selective_scan(u, **layer, **options, implementation=implementation)

    def scanned(u, layers):
        body = jax.checkpoint(lambda u, layer: (block(u, layer, implementation), None))
        return jnp.sum(jnp.sin(jax.lax.scan(body, u, layers)[0]))

    def looped(u, layers):
        for i in range(4):
            u = block(u, jax.tree.map(lambda x: x[i], layers), "reference")  # noqa: B023
        return jnp.sum(jnp.sin(u))

    actual = jax.jit(jax.grad(scanned, (0, 1)))(u, layers)
    expected = jax.grad(looped, (0, 1))(u, layers)
    assert_close(actual[0], expected[0], 5e-4)
    for name in layers:
        assert_close(actual[1][name], expected[1][name], 5e-4, name)


@pytest.mark.parametrize("implementation", XLA[:2])
def test_memory_is_far_below_all_states(implementation: str):
    """Bound the memory of a long scan, forward and backward, compiled only.

    All states would be 1.6 GB, and autodiff keeps several.
    """
    spec = ScanSpec(4, 16384, 384)
    arrays = jax.eval_shape(lambda: spec.arguments(0)[0])
    compiled = jax.jit(jax.grad(lambda a: objective(a, {}, implementation))).lower(arrays).compile()
    all_states = 4 * spec.batch * spec.length * spec.channels * spec.states
    sequences = 4 * spec.batch * spec.length * spec.channels
    temporary = compiled.memory_analysis().temp_size_in_bytes
    # A dozen arrays of the inputs' size, and either the chunk in work or the run in work.
    allowed = {"xla_sequential": 0.6, "xla_associative": 1.0}[implementation]
    assert 3 * sequences < temporary < allowed * all_states, f"{temporary / all_states:.2f} of all"


def test_program_does_not_grow_with_length():
    def equations(length: int) -> int:
        spec = ScanSpec(1, length, 4)
        arrays = jax.eval_shape(lambda: spec.arguments(0)[0])
        traced = jax.make_jaxpr(jax.grad(lambda a: objective(a, {}, "xla_sequential")))(arrays)
        return str(traced).count("=")

    assert equations(4096) == equations(512)
    assert equations(4096) < 3 * equations(14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": (2, 5)}, r"u must have 3 dimensions \(b l e\), got shape \(2, 5\)"),
        ({"A": (6,)}, r"A must have 2 dimensions \(e n\), got shape \(6,\)"),
        ({"A": (5, 3)}, r"A must have shape \(6, 3\) \(e n\).*got \(5, 3\)"),
        ({"delta": (2, 4, 6)}, r"delta must have shape \(2, 5, 6\).*got \(2, 4, 6\)"),
        ({"B": (2, 5, 4)}, r"B must have shape \(2, 5, 3\).*got \(2, 5, 4\)"),
        ({"B": (2, 5)}, r"B must be `b l n` or `b l g n`, got shape \(2, 5\)"),
        ({"C": (2, 5, 1, 3)}, r"C must have shape \(2, 5, 3\).*got \(2, 5, 1, 3\)"),
        ({"B": (2, 5, 4, 3)}, r"6 channels of u do not split evenly into the 4 groups"),
        ({"D": (5,)}, r"D must have shape \(6,\)"),
        ({"z": (2, 5, 5)}, r"z must have shape \(2, 5, 6\)"),
        ({"delta_bias": (1,)}, r"delta_bias must have shape \(6,\)"),
        ({"u": (2, 0, 6)}, r"no axis but the batch may be empty, got u \(2, 0, 6\)"),
    ],
)
def test_wrong_shapes(change, message: str):
    shapes = {"u": (2, 5, 6), "delta": (2, 5, 6), "A": (6, 3), "B": (2, 5, 3), "C": (2, 5, 3)}
    arrays = {k: jnp.ones(s) for k, s in (shapes | change).items()}
    # The suite's own shape checks sit around the function and would speak first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(selective_scan)(**arrays)


def test_wrong_dtype_and_names():
    arrays, _ = ScanSpec(1, 2, 3, states=1).arguments(0)
    integers = arrays | {"delta": jnp.ones((1, 2, 3), jnp.int32)}
    with pytest.raises(ValueError, match="delta must be floating point, got int32"):
        inspect.unwrap(selective_scan)(**integers)
    with pytest.raises(ValueError, match=r"'auto', 'xla', .*'reference'; got 'cuda'"):
        selective_scan(**arrays, implementation="cuda")


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize("reason", [None, "it has 99 states"])
def test_triton_by_name(seed, monkeypatch, caplog, reason):
    """Run what Triton's kernels do not cover as the associative scan.

    A program for another platform runs as XLA's choice.
    """
    monkeypatch.setattr(gpu, "triton_missing", lambda: None)
    gpu.log_once.cache_clear()
    name = "pallas_kernels.selective_scan.triton"
    kernels = ModuleType(name)
    kernels.unsupported, kernels.chunk_length = (lambda inputs: reason), (lambda inputs: 8)
    kernels.forward, kernels.backward = xla_sequential.forward, xla_sequential.backward
    monkeypatch.setitem(sys.modules, name, kernels)
    arrays, options = ScanSpec(2, 21, 4, states=3, z=True).arguments(seed)
    got, wanted = (
        jax.grad(lambda a, name=name: objective(a, options, name))(arrays)
        for name in ("triton", "reference")
    )
    for key in arrays:
        assert_close(got[key], wanted[key], 5e-4, key)
    said = [] if reason is None else [f"since {reason}"]
    assert [r.message.split(", ")[-1] for r in caplog.records] == said


def test_numpy_arrays_are_taken():
    arrays, _ = ScanSpec(1, 3, 2, states=2).arguments(1)
    as_numpy = {k: np.asarray(x) for k, x in arrays.items()}
    y = inspect.unwrap(selective_scan)(**as_numpy)
    np.testing.assert_array_equal(y, selective_scan(**arrays))


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla_sequential", "xla_associative"])
def test_scans_of_consecutive_pieces_equal_one_scan(seed, implementation, reverse):
    """Compare with one scan: the last state of a piece is the next one's initial state.

    Gradients go through it to the first piece.
    """
    arrays, _ = ScanSpec(2, 70, 4, states=3).arguments(seed)
    normal = np.random.default_rng(seed).standard_normal
    arrays["initial_state"] = jnp.asarray(normal((2, 4, 3)), jnp.float32)
    y_bar, last_bar = (jnp.asarray(normal(shape), jnp.float32) for shape in ((2, 70, 4), (2, 4, 3)))
    options = {"reverse": reverse, "return_last_state": True, "implementation": implementation}

    def whole(arrays):
        return selective_scan(**arrays, **options | {"implementation": "reference"})

    def in_pieces(arrays):
        state, done = arrays["initial_state"], []
        pieces = [slice(0, 19), slice(19, 70)]
        for piece in reversed(pieces) if reverse else pieces:
            of_it = {k: x[:, piece] if x.shape[:2] == (2, 70) else x for k, x in arrays.items()}
            y, state = selective_scan(**of_it | {"initial_state": state}, **options)
            done.append(y)
        return jnp.concatenate(done[::-1] if reverse else done, axis=1), state

    both = []
    for run in (whole, in_pieces):
        out, pull = jax.vjp(run, arrays)
        both.append((out, pull((y_bar, last_bar))[0]))
    assert max(relative_errors(both[1], both[0])) < 1e-5


@needs_mosaic
def test_the_kernels_do_not_start_from_a_state():
    arrays, _ = ScanSpec(1, 3, 2, states=2).arguments(0)
    state = jnp.zeros((1, 2, 2))
    with abstract_h100(), pytest.raises(NotImplementedError, match="starts from a given state"):
        selective_scan(**arrays, initial_state=state, implementation="pallas")


@pytest.mark.parametrize("implementation", ["reference", "xla_sequential", "xla_associative"])
def test_an_empty_batch(implementation):
    arrays, _ = ScanSpec(2, 130, 4, states=3).arguments(0)
    empty = {k: x[:0] if x.shape[:2] == (2, 130) else x for k, x in arrays.items()}
    y, pull = jax.vjp(lambda a: selective_scan(**a, implementation=implementation), empty)
    assert y.shape == (0, 130, 4)
    assert not any(np.any(g) for g in jax.tree.leaves(pull(y)))


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_forward_mode_is_refused_with_the_implementation_that_has_it(seed):
    arrays, _ = ScanSpec(1, 5, 3, states=2).arguments(seed)

    def run(u, implementation):
        return selective_scan(**arrays | {"u": u}, implementation=implementation)

    u = arrays["u"]
    with pytest.raises(TypeError, match="implementation='reference'"):
        jax.jvp(lambda u: run(u, "auto"), (u,), (u,))
    forward = jax.jacfwd(lambda u: run(u, "reference"))(u)
    assert_close(forward, jax.jacrev(lambda u: run(u, "auto"))(u), 1e-5)


@pytest.mark.parametrize(("length", "name"), [(256, "xla_sequential"), (257, "xla_associative")])
def test_where_no_kernel_runs_the_length_decides_on_gpus(length, name):
    backend = implementations.xla_backend(length)
    assert backend.default.__name__.endswith(name)
    assert backend.cpu.__name__.endswith("xla_sequential")

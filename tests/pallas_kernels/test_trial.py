"""Kernels that do not compile on a device nobody tried them on: one line, and XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu, mixer_core, selective_scan, sequence_core, trial
from pallas_kernels.mixer_core import add_norm, add_norm_unsupported
from pallas_kernels.mixer_core.sequence_xla import Convolutions
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels import test_mosaic_scan as scan
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)

pytestmark = needs_mosaic
GRID = {"rows": 3, "columns": 4}


@pytest.fixture
def blackwell(monkeypatch):
    """Return a device that nobody has tried; on this CPU no Mosaic kernel compiles."""
    monkeypatch.setattr(gpu, "_capabilities", lambda: (10.0,))
    monkeypatch.setattr(gpu, "_no_device", lambda: None)
    monkeypatch.setattr(trial, "_results", {})
    gpu.log_once.cache_clear()


def operations(rng):
    """Return each operation as a function of its implementation, and its arrays."""
    (xz, directions, norm, params), _ = core.draw(rng, 1, 3, 4, 128)
    convolutions = Convolutions(directions.kernels, directions.biases)
    middle = lambda _, c: (c[0], c[1])  # noqa: E731
    inputs = scan.draw(rng, 1, 6, 32, 4)
    return {
        "mixer_core": (
            lambda name, xz: mixer_core(
                xz, directions, norm, params, middle=middle, implementation=name, **GRID
            ),
            xz,
        ),
        "sequence_core": (
            lambda name, xz: sequence_core(
                xz, convolutions, norm, params, middle=middle, implementation=name
            ),
            xz,
        ),
        "selective_scan": (
            lambda name, u: selective_scan(**{**inputs, "u": u}, implementation=name),
            inputs["u"],
        ),
    }


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize("operation", ["mixer_core", "sequence_core", "selective_scan"])
def test_kernels_that_do_not_compile(blackwell, rng, caplog, operation):
    run, x = operations(rng)[operation]
    value = lambda name: jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(run(name, x)))))  # noqa: E731
    got = value("auto")(x)
    value("auto")(x)
    assert max(relative_errors(got, value("xla")(x))) < 1e-6
    (record,) = caplog.records
    said = f"{operation}: using XLA and not the GPU kernels, since they do not compile for cpu"
    assert record.message.startswith(said)
    assert "Error: " in record.message
    with pytest.raises(Exception, match=r"(?i)cpu"):  # the compiler's own
        value("pallas")(x)


def test_a_block_ends_without_kernels_where_they_do_not_compile(blackwell, rng, caplog):
    """Compile the kernels for residual sum and norm before a block counts on them, and their gradient's."""
    residual = jax.ShapeDtypeStruct((4, 3, 128), jnp.float32)
    update = jax.ShapeDtypeStruct(residual.shape, jnp.bfloat16)
    for _ in range(2):
        assert "do not compile for cpu" in str(add_norm_unsupported(update, residual))
    (record,) = caplog.records
    assert record.message.startswith("add_norm: using XLA and not the GPU kernels, since they do ")
    args = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 3, 128), (128,))]
    text = jax.jit(add_norm).lower(args[0].astype(update.dtype), *args).as_text()
    assert "mosaic" not in text


def test_what_is_compiled_are_the_kernels_of_both_passes(monkeypatch):
    compiled = []
    monkeypatch.setattr(gpu, "trial_failure", lambda name, trial: compiled.append(trial))
    update = jax.ShapeDtypeStruct((4, 3, 128), jnp.bfloat16)
    with abstract_h100():
        assert add_norm_unsupported(update, update) is None
    (found,) = compiled

    def with_gradient(arrays):
        out, pull = jax.vjp(found.run, *arrays)
        return out, pull(out)

    text = lower_for_h100(with_gradient, found.arrays)
    for kernel in ("mixer_sum_norm", "mixer_norm_gradient"):
        assert launches(text, kernel) == 1


def test_it_compiles_once_for_each_shape(blackwell, monkeypatch):
    compiled = []
    monkeypatch.setattr(trial, "_failure", lambda run, arrays: compiled.append(arrays))
    choose = lambda size, name="auto": gpu.choose(  # noqa: E731
        name, "an operation", lambda: None, trial.Trial(jnp.sin, (np.zeros(size),), None)
    )
    assert all([choose(3), choose(3), choose(4), choose(4, "pallas")])
    assert [arrays[0].shape for arrays in compiled] == [(3,), (4,)]
    monkeypatch.setattr(gpu, "_capabilities", lambda: (9.0, 9.0))
    assert choose(5)
    assert len(compiled) == 2


def test_what_it_compiles_is_forward_and_backward():
    """Compile forward and backward outside of the mesh and the arrays of the program that is being traced.

    Integers have no gradient.
    """
    seen = []

    @jax.custom_vjp
    def run(x, ids):
        seen.append(jax.sharding.get_abstract_mesh().empty)
        return x * ids

    def backward(_, bar):
        seen.append(jax.sharding.get_abstract_mesh().empty)
        return bar, None

    run.defvjp(lambda x, ids: (run(x, ids), None), backward)

    def traced(x):
        arrays = (x, jnp.ones(3, jnp.int32))
        assert trial.compile_failure("an operation", trial.Trial(run, arrays, 0)) is None
        return x

    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        jax.jit(traced)(jnp.ones(3))
    assert seen == [True, True]

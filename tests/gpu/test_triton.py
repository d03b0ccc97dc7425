"""The Triton kernels of the scan on a real GPU, against float64 on the CPU of the same machine.

`JAX_PLATFORMS=cuda pytest tests/gpu/test_triton.py`; skipped where there is no GPU or no jax-triton.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bidirectional_scan, gpu, selective_scan
from tests.gpu.test_kernels import on_cpu_in_float64
from tests.pallas_kernels import test_mosaic_scan as scan
from tests.pallas_kernels.mosaic_support import relative_errors

pytestmark = pytest.mark.skipif(
    gpu.triton_missing() is not None, reason=f"no Triton kernels: {gpu.triton_missing()}"
)

SCANS = [
    {"b": 128, "l": 14, "e": 384, "n": 16},
    {"b": 4, "l": 196, "e": 384, "n": 16, "dtype": "bfloat16"},
    {"b": 2, "l": 2048, "e": 64, "n": 16},  # time is split
    {"b": 1, "l": 2500, "e": 392, "n": 16},
    {"b": 1, "l": 1, "e": 1, "n": 1},
    {"b": 2, "l": 700, "e": 50, "n": 7},
    {"b": 2, "l": 65, "e": 96, "n": 16, "g": 3},
    {"b": 1, "l": 50, "e": 64, "n": 32, "drop": ("z", "D", "delta_bias")},
    {"b": 2, "l": 37, "e": 24, "n": 16, "start": True},
    {"b": 1, "l": 2048, "e": 40, "n": 5, "start": True},  # time is split
    None,
    None,
]


def compiled(function, *args):
    """Return the program, which holds a Triton kernel."""
    program = jax.jit(function).lower(*args).compile()
    assert "triton_kernel_call" in program.as_text()
    return program


def cotangents(rng, b, l, e, n, dtype="float32"):
    return (
        jnp.asarray(rng.standard_normal((b, l, e)), dtype),
        jnp.asarray(rng.standard_normal((b, e, n)), jnp.float32),
    )


@pytest.mark.parametrize("case", SCANS)
@pytest.mark.parametrize("reverse", [False, True])
def test_scan(seed, case, reverse):
    rng = np.random.default_rng(seed)
    if case is None:
        tops = (("b", 5), ("l", 300), ("e", 500), ("n", 33))
        case = {k: int(rng.integers(1, top)) for k, top in tops}
    print(case)
    case = dict(case)
    drop, start = case.pop("drop", ()), case.pop("start", False)
    args = {k: x for k, x in scan.draw(rng, **case).items() if k not in drop}
    b, e, n = (case[k] for k in "ben")
    if start:
        args["initial_state"] = jnp.asarray(rng.standard_normal((b, e, n)), jnp.float32)
    case.pop("g", None)
    bars = cotangents(rng, **case)
    run = lambda a, c: scan.values_and_gradients(a, c, "triton", reverse=reverse)  # noqa: E731
    program = compiled(run, args, bars)
    wanted = on_cpu_in_float64(
        lambda a, c: scan.values_and_gradients(a, c, "xla_sequential", reverse=reverse), args, bars
    )
    first = jax.device_get(program(args, bars))
    errors = relative_errors(first, wanted)
    assert max(errors) < (1e-2 if "dtype" in case else 1e-5), errors
    again = jax.device_get(program(args, bars))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_steps_without_softplus(seed):
    rng = np.random.default_rng(seed)
    args = scan.draw(rng, 2, 30, 48, 8)
    args |= {"delta": jnp.abs(args["delta"]), "delta_bias": jnp.abs(args["delta_bias"])}
    bars = cotangents(rng, 2, 30, 48, 8)
    run = lambda name: lambda a, c: scan.values_and_gradients(a, c, name, delta_softplus=False)  # noqa: E731
    got = compiled(run("triton"), args, bars)(args, bars)
    assert max(relative_errors(got, on_cpu_in_float64(run("xla_sequential"), args, bars))) < 1e-5


def test_both_directions(seed):
    rng = np.random.default_rng(seed)
    one = {k: x for k, x in scan.draw(rng, 2, 40, 96, 16).items() if k != "z"}
    both = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), one)
    bars = tuple(jnp.asarray(rng.standard_normal((2, 40, 96)), jnp.float32) for _ in range(2))

    def run(name):
        def values_and_gradients(a, c):
            out, pull = jax.vjp(lambda a: bidirectional_scan(**a, implementation=name), a)
            return out, pull(c)[0]

        return values_and_gradients

    got = compiled(run("triton"), both, bars)(both, bars)
    assert max(relative_errors(got, on_cpu_in_float64(run("reference"), both, bars))) < 1e-5


def test_vmap_runs_the_associative_scan_and_says_so(seed, caplog):
    gpu.log_once.cache_clear()
    args = scan.draw(np.random.default_rng(seed), 2, 30, 64, 16)
    scanned = lambda a: selective_scan(**a, implementation="triton")  # noqa: E731
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), args)
    gradient = jax.grad(lambda a: jnp.sum(jnp.sin(scanned(a))))
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        rows = jax.jit(jax.vmap(gradient))(stacked)
    assert "under jax.vmap the associative scan" in caplog.text
    plain = jax.jit(gradient)(args)
    for i in range(2):
        assert max(relative_errors(jax.tree.map(lambda x, i=i: x[i], rows), plain)) < 1e-5


def test_scan_of_blocks_and_checkpoint(seed):
    args = scan.draw(np.random.default_rng(seed), 2, 30, 64, 16)
    u = args.pop("u")

    def gradient(name, remat):
        def loss(args):
            block = lambda u, _: (selective_scan(u, **args[1], implementation=name), None)  # noqa: E731
            block = jax.checkpoint(block) if remat else block
            return jnp.sum(jnp.sin(jax.lax.scan(block, args[0], None, 3)[0]))

        return jax.grad(loss)

    args = (u, args)
    wanted = on_cpu_in_float64(gradient("xla_sequential", False), args)
    got = compiled(gradient("triton", True), args)(args)
    plain = jax.jit(gradient("xla_sequential", False))(args)  # float32 amplified by three blocks
    most = [max(1e-5, 3 * error) for error in relative_errors(plain, wanted)]
    assert all(e < m for e, m in zip(relative_errors(got, wanted), most, strict=True))


def test_auto_takes_them_on_gpus_before_hopper(seed, monkeypatch):
    monkeypatch.setattr(gpu, "_capabilities", lambda: (8.0,))
    monkeypatch.setattr(gpu, "kernels_missing", lambda: "older than Hopper")
    args = scan.draw(np.random.default_rng(seed), 2, 30, 64, 16)
    compiled(lambda a: selective_scan(**a), args)

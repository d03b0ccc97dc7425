"""The Mosaic GPU scan without a GPU: in the interpreter against float64, and lowered for an H100.

The interpreter fills fresh buffers with NaN, so that an element nobody wrote shows.
"""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu, selective_scan
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import x64

pytestmark = needs_mosaic


def draw(rng, b, l, e, n, g=1, dtype="float32"):
    """Draw arguments of a scan, by their names."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    streamed = lambda *shape: normal(*shape).astype(dtype)  # noqa: E731
    return {
        "u": streamed(b, l, e), "delta": streamed(b, l, e) - 1, "A": -jnp.exp(normal(e, n)),
        "B": streamed(b, l, g, n), "C": streamed(b, l, g, n),
        "D": normal(e), "z": streamed(b, l, e), "delta_bias": normal(e),
    }  # fmt: skip


def values_and_gradients(args, cotangents, implementation, **options):
    """Return output, last state and every gradient."""

    def run(args):
        return selective_scan(
            **args, **options, return_last_state=True, implementation=implementation
        )

    out, pull = jax.vjp(run, args)
    return out, pull(cotangents)[0]


def compare(rng, bound, *, b, l, e, n, g=1, dtype="float32", drop=(), **options):
    """Compare the kernel in the interpreter with the reference in float64."""

    args = {k: v for k, v in draw(rng, b, l, e, n, g, dtype).items() if k not in drop}
    if not options.get("delta_softplus", True):  # steps are then the numbers themselves
        args |= {"delta": jnp.abs(args["delta"]), "delta_bias": jnp.abs(args["delta_bias"])}
    cotangents = (
        jnp.asarray(rng.standard_normal((b, l, e)), dtype),
        jnp.asarray(rng.standard_normal((b, e, n)), jnp.float32),
    )
    with abstract_h100(), interpreted():
        run = jax.jit(lambda a, c: values_and_gradients(a, c, "pallas", **options))
        traced = run.trace(args, cotangents)
        got = traced.lower().compile()(args, cotangents)
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, cotangents))
        reference = jax.jit(lambda *a: values_and_gradients(*a, "reference", **options))
        wanted = reference(*wide)
    errors = relative_errors(got, wanted)
    bounds = [bound] * len(errors)
    if max(errors) >= bound:
        # One draw in some ten thousand is so badly conditioned that XLA's float32 does not keep to the bound either.
        plain = values_and_gradients(args, cotangents, "xla_sequential", **options)
        bounds = [max(bound, 3 * error) for error in relative_errors(plain, wanted)]
    assert all(e < most for e, most in zip(errors, bounds, strict=True)), (errors, bounds)


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_random_ragged_scan(seed):
    rng = np.random.default_rng(seed)
    compare(
        rng,
        3e-6,
        b=1,
        l=int(rng.integers(17, 30)),
        e=int(rng.integers(33, 60)),
        n=int(rng.integers(1, 17)),
        reverse=bool(rng.integers(2)),
    )


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_one_step_of_one_channel_and_state(seed):
    compare(np.random.default_rng(seed), 3e-6, b=1, l=1, e=1, n=1)


@pytest.mark.drawn("kernel shapes", one_in=20)
@pytest.mark.parametrize("dtype", ["u", "delta"])
def test_arrays_of_two_dtypes(seed, dtype):
    """Keep float32's accuracy in the gradients of float32 arrays, beside tokens in bfloat16."""

    rng = np.random.default_rng(seed)
    args = draw(rng, 1, 11, 32, 4)
    args[dtype] = args[dtype].astype(jnp.bfloat16)
    cotangents = (
        jnp.asarray(rng.standard_normal((1, 11, 32)), args["u"].dtype),
        jnp.asarray(rng.standard_normal((1, 32, 4)), jnp.float32),
    )
    with abstract_h100(), interpreted():
        run = jax.jit(lambda a, c: values_and_gradients(a, c, "pallas"))
        _, got = run.trace(args, cotangents).lower().compile()(args, cotangents)
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, cotangents))
        _, wanted = jax.jit(lambda *a: values_and_gradients(*a, "reference"))(*wide)
    del got[dtype], wanted[dtype]
    assert max(relative_errors(got, wanted)) < 3e-6


@pytest.mark.drawn("kernel shapes", one_in=20)
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"b": 2, "l": 7, "e": 24, "n": 16},
        {"b": 1, "l": 21, "e": 64, "n": 5, "g": 2, "reverse": True, "delta_softplus": False},
        {"b": 1, "l": 19, "e": 33, "n": 20, "drop": ("z", "D")},
        {"b": 1, "l": 9, "e": 32, "n": 64, "drop": ("delta_bias",)},
        {"b": 2, "l": 20, "e": 40, "n": 16, "dtype": "bfloat16"},
    ],
)
def test_options(seed, case):
    compare(np.random.default_rng(seed), 1e-2 if "dtype" in case else 3e-6, **case)


@pytest.mark.drawn("kernel shapes", one_in=20)
@pytest.mark.slow
def test_time_cut_into_splits(seed, monkeypatch):
    """Carry states, forward and backward, where one sequence is shared by several blocks."""
    from pallas_kernels.selective_scan import mosaic

    monkeypatch.setattr(mosaic, "ENOUGH_BLOCKS", 6)
    inputs = draw(np.random.default_rng(0), 1, 270, 32, 4)
    from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions

    options = ScanOptions(delta_softplus=True, reverse=False, return_last_state=True, chunk=16)
    assert mosaic.plan(ScanInputs(**inputs), options, 16).splits > 1
    compare(np.random.default_rng(seed), 3e-6, b=1, l=270, e=32, n=4, reverse=bool(seed % 2))


@pytest.mark.drawn("kernel shapes", one_in=20)
def test_states_carried_over_many_splits(seed, monkeypatch):
    """Carry states over more splits than are read together, the last of them past the end."""
    from pallas_kernels.selective_scan import mosaic, mosaic_walk

    plan = mosaic.plan
    monkeypatch.setattr(mosaic, "plan", lambda *a: dataclasses.replace(plan(*a), splits=6))
    assert 6 > mosaic_walk.AT_ONCE
    length = int(np.random.default_rng(seed).integers(70, 97))
    compare(np.random.default_rng(seed), 3e-6, b=1, l=length, e=32, n=4, reverse=bool(seed % 2))


@pytest.mark.drawn("kernel shapes", one_in=20)
def test_blocks_of_several_sequences(seed, monkeypatch):
    """Scan several sequences of one tile each, in turn by one block.

    Nothing of the sequence before is left in the state, and sums over sequences are complete.
    """
    from pallas_kernels.selective_scan import mosaic

    monkeypatch.setattr(mosaic, "_sequences", lambda *_: 3)
    length = int(np.random.default_rng(seed).integers(1, 17))
    compare(np.random.default_rng(seed), 3e-6, b=6, l=length, e=40, n=5, reverse=bool(seed % 2))


def test_how_many_sequences_a_block_visits(seed):
    from pallas_kernels.selective_scan import mosaic

    rng = np.random.default_rng(seed)
    for _ in range(100):
        case = {"b": int(rng.integers(1, 300)), "length": int(rng.integers(1, 40))}
        cut, _ = padded(**case, e=int(rng.integers(1, 800)), keep=True)
        found = mosaic._sequences(cut)
        assert cut.batch % found == 0
        assert found == 1 or cut.chunks == 1
    alone, _ = padded(b=1, length=14, e=384, keep=True)
    few, _ = padded(b=16, length=14, e=384, keep=True)  # all blocks run at once anyway
    many, _ = padded(b=128, length=14, e=384, keep=True)
    assert (mosaic._sequences(alone), mosaic._sequences(few)) == (1, 1)
    assert mosaic._sequences(many) > 1


def padded(b, length, e, keep):
    """Return the plan of a scan of no values, and the shape of u as its kernels see it."""
    from pallas_kernels.selective_scan import mosaic
    from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions

    def steps(x):
        whole = x.ndim > 2 and x.shape[:2] == (1, 1)
        return jax.ShapeDtypeStruct((b, length, *x.shape[2:]), x.dtype) if whole else x

    one = jax.eval_shape(lambda: draw(np.random.default_rng(0), 1, 1, e, 4))
    inputs = ScanInputs(**jax.tree.map(steps, one))
    chunk = mosaic.chunk_length(inputs) if keep else mosaic.forward_chunk(inputs)
    options = ScanOptions(True, False, False, chunk, keep_boundaries=keep)
    u = jax.eval_shape(lambda inputs: mosaic._operands(inputs, options, chunk).u, inputs)
    return mosaic._cut(inputs, options, chunk), u.shape


def test_every_tile_lies_in_its_own_sequence(seed):
    """Place every tile in its own sequence.

    Tiles as wide as the array are written whole, also those past the end: the interpreter would clip them.
    """
    rng = np.random.default_rng(seed)
    tops = {"b": 5, "length": 6000, "e": 71}
    random = [{name: int(rng.integers(1, top)) for name, top in tops.items()} for _ in range(30)]
    known = [{"b": 2, "length": 2100, "e": e} for e in (32, 64)]
    split = 0
    for case in (*known, *random):
        for keep in (False, True):
            cut, (_, length, width) = padded(**case, keep=keep)
            if cut.channels == width:
                split += cut.splits > 1
                assert length >= cut.chunks * cut.chunk, (case, keep)
            assert length >= case["length"] and width >= case["e"]
    assert split > 3


@pytest.mark.drawn("kernels lowered")
@pytest.mark.parametrize(
    "case",
    [
        {"b": 128, "l": 14, "e": 384, "n": 16},
        {"b": 2, "l": 4096, "e": 392, "n": 16, "dtype": "bfloat16"},
    ],
)
def test_lowers_for_an_h100(case):
    """Find the kernels forward and backward; a short scan is one kernel each way."""
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), **case))
    shape = (case["b"], case["l"], case["e"])
    cotangents = (
        jax.ShapeDtypeStruct(shape, case.get("dtype", "float32")),
        jax.ShapeDtypeStruct((case["b"], case["e"], case["n"]), jnp.float32),
    )
    text = lower_for_h100(lambda a, c: values_and_gradients(a, c, "auto"), args, cotangents)
    # The way back computes the ungated output again, for z's gradient.
    assert launches(text, "selective_scan") == 2 and launches(text, "selective_scan_gradients") == 1


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_auto_on_the_cpu_uses_the_same_residuals(seed):
    """Compare a program traced for a GPU and run on a CPU: XLA's states pass through the kernels' form and back."""
    rng = np.random.default_rng(seed)
    args = draw(rng, 1, 37, 40, 16)
    cotangents = (
        jnp.asarray(rng.standard_normal((1, 37, 40)), jnp.float32),
        jnp.asarray(rng.standard_normal((1, 40, 16)), jnp.float32),
    )
    with abstract_h100():
        traced = jax.jit(lambda a, c: values_and_gradients(a, c, "auto", reverse=True)).trace(
            args, cotangents
        )
    got = traced.lower().compile()(args, cotangents)
    wanted = values_and_gradients(args, cotangents, "reference", reverse=True)
    assert max(relative_errors(got, wanted)) < 1e-5


def test_asked_for_by_name_it_says_why_not():
    args = draw(np.random.default_rng(0), 1, 8, 32, 4)
    with pytest.raises(NotImplementedError, match="there is no GPU"):
        selective_scan(**args, implementation="pallas")
    with abstract_h100(), pytest.raises(NotImplementedError, match="at most 64"):
        selective_scan(**draw(np.random.default_rng(0), 1, 8, 32, 65), implementation="pallas")


def test_an_unsupported_case_falls_back_with_one_line(caplog):
    gpu.log_once.cache_clear()
    args = draw(np.random.default_rng(0), 1, 8, 32, 65)
    with abstract_h100(), caplog.at_level(logging.WARNING, logger="pallas_kernels"):
        for _ in range(2):
            jax.jit(lambda a: selective_scan(**a)).trace(args)
    assert [r.message for r in caplog.records if "65 states" in r.message] == [
        "selective_scan: using XLA and not the GPU kernels, since it has 65 states, "
        "and the kernels hold at most 64"
    ]

"""The end of a block as one kernel: interpreted against float64, lowered for an H100, and its derivative rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mixer_core import Projection, mixer_block
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import x64

BOUND = 1e-2  # of bfloat16
FULL = {"b": 64, "rows": 17, "columns": 9}  # one segment per row: as many as "auto" asks for


def draw(rng, b, rows, columns, e, taps=4, per_position=1, stream="float32", **options):
    """Draw arguments, and the gradients of both results; `stream` is the dtype of the residual stream."""
    del options
    d = e // 2
    (xz, directions, norm, params), _ = core.draw(
        rng, b, rows, columns, e, taps, "bfloat16", per_position
    )
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    tokens = (b, xz.shape[1], d)
    args = (xz, normal(*tokens).astype(stream), directions, norm)
    args += (Projection(normal(d, e) / e**0.5, normal(d)), params)
    return args, (normal(*tokens).astype(stream), normal(*tokens).astype("bfloat16"))


def abstract(case):
    """Return the shapes of the arguments."""
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), **{**case, "b": 1})[0])
    size = lambda x: (case["b"], *x.shape[1:]) if x.ndim == 3 and x.shape[0] == 1 else x.shape  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(size(x), x.dtype), args)


def block(args, implementation, rows, columns, **options):
    del options["b"], options["e"]
    options.pop("stream", None)
    scanned = options.pop("scanned", None)
    more = {"rows": rows, "columns": columns, "implementation": implementation, **options}

    def middle(params, u):
        rounds = scanned is not None and u.dtype == jnp.float32  # the reference does not
        return tuple(y.astype(scanned if rounds else u.dtype) for y in core.middle(params, u))

    return mixer_block(*args, middle=middle, **more)


def wanted_of(args, case):
    """Return the reference's results. The kernel rounds the weight, and so does the reference, nothing else."""
    *rest, projection, params = args
    rounded = Projection(projection.weight.astype("bfloat16"), projection.gain)
    with x64():
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, np.float64)), (*rest, rounded, params)
        )
        return jax.device_get(block(wide, "xla", **case))


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize(
    ("processors", "stream"), [(132, "float32"), (132, "bfloat16"), (1, "float32")]
)
def test_kernel(seed, monkeypatch, processors, stream):
    """Compute an incomplete tile, and tokens that a segment's 16 rows hold twice.

    With one processor, W comes in parts.
    """
    from pallas_kernels.mixer_core import mosaic_back_project

    monkeypatch.setattr(mosaic_back_project, "PROCESSORS", processors)
    rng = np.random.default_rng(seed)
    columns, transposed = int(rng.integers(8, 17)), bool(rng.integers(2))
    width = 128 if processors > 1 else 256  # so that there are more parts than on their way
    case = {"b": 2, "rows": 5, "columns": columns, "e": width, "transposed": transposed}
    case |= {"stream": stream, "scanned": str(rng.choice(["float32", "bfloat16"]))}
    case |= {"pooled_dtype": [None, "bfloat16"][rng.integers(2)]}
    print(case)
    args, _ = draw(rng, **case)
    with abstract_h100(), interpreted():
        run = jax.jit(lambda args: block(args, "pallas", **case))
        got = jax.device_get(run.trace(args).lower().compile()(args))
    assert [x.dtype.name for x in got] == [stream, "bfloat16"]
    assert max(relative_errors(got, wanted_of(args, case))) < BOUND


@needs_mosaic
def test_every_segment_has_one_thread_block(seed):
    """Give every segment one thread block, also where some thread blocks take one segment more than others."""
    from pallas_kernels.mixer_core.mosaic_back_project import Work

    rng = np.random.default_rng(seed)
    grids = [
        (1, int(rows), 14) for rows in (5, rng.integers(133, 1056), 1056, rng.integers(1057, 5000))
    ]
    for batch, rows, columns in [*grids, *MODELS, (4, 512, 16), (1, 1848, 16), (1, 1849, 16)]:
        work = Work(batch, rows, columns, False, 384, 192)
        first, stop = jax.vmap(work.share)(jnp.arange(work.thread_blocks, dtype=jnp.int32))
        assert first[0] == 0 and stop[-1] == work.segments
        np.testing.assert_array_equal(first[1:], stop[:-1])
        assert np.all((stop - first >= 1) & (stop - first <= 4))


MODELS = {(128, 14, 14): 514, (32, 32, 32): 512, (8, 64, 64): 512, (2, 128, 128): 512}
"""Thread blocks by batch and grid, as FastVim-T is measured."""


@needs_mosaic
def test_short_thread_blocks_add_no_round():
    """At 224 px 132 thread blocks are short. At larger sizes two rounds hold as many whole tiles as there are."""
    from pallas_kernels.mixer_core.mosaic_back_project import Work

    found = {grid: Work(*grid, True, 384, 192).thread_blocks for grid in MODELS}
    assert found == MODELS
    for segments in range(1057, 6000, 37):
        work = Work(1, segments, 16, False, 384, 192)
        assert -(-work.thread_blocks // 264) == -(-segments // 4 // 264)


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_lowers_for_an_h100(stream):
    """Lower FastVim-T's blocks, in both orders."""
    case = {"b": 128, "rows": 14, "columns": 14, "e": 384, "stream": stream}
    args = abstract(case)
    orders = [False, True]
    text = lower_for_h100(lambda a: [block(a, "auto", **case, transposed=t) for t in orders], args)
    assert launches(text, "mixer_back_project") == 2
    assert launches(text, "mixer_back") == 0


def value_and_gradients(args, bars, implementation, case):
    out, pull = jax.vjp(lambda args: block(args, implementation, **case), args)
    return out, pull(bars)[0]


def rounded(args):
    """Return the arguments with the projection's weight as the kernel reads it."""
    *rest, projection, params = args
    weight = projection.weight.astype("bfloat16").astype("float32")
    return (*rest, projection._replace(weight=weight), params)


def wanted_gradients(args, bars, case):
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, bars))
        return jax.device_get(jax.jit(lambda *a: value_and_gradients(*a, "xla", case))(*wide))


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_gradients(seed, stream):
    """Compare all kernels of a training step's block, with drop path, with float64."""
    rng = np.random.default_rng(seed)
    columns, transposed = int(rng.integers(8, 15)), bool(rng.integers(2))
    rows = 4 if transposed else 2
    keep = jnp.asarray(rng.permutation([0.0, 1.25]), jnp.float32)
    case = {"b": 2, "rows": rows, "columns": columns, "e": 128, "transposed": transposed}
    case |= {"keep": keep, "stream": stream}
    print(case)
    args, bars = draw(rng, **case)
    args = rounded(args)
    with abstract_h100(), interpreted():
        run = jax.jit(lambda *a: value_and_gradients(*a, "pallas", case))
        got = jax.device_get(run.trace(args, bars).lower().compile()(args, bars))
    assert max(relative_errors(got, wanted_gradients(args, bars, case))) < 2 * BOUND


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
@pytest.mark.parametrize("drops", [False, True])
def test_norm_gradient(seed, stream, drops):
    """Compare with float64, with one token a warp or two."""
    from pallas_kernels.mixer_core import xla
    from pallas_kernels.mixer_core.mosaic_norm_gradient import norm_gradient, unsupported

    rng = np.random.default_rng(seed)
    width = int(rng.choice([64, 192, 384]))
    tokens = (2, 2 * int(rng.integers(2, 6)), width)
    print(tokens)
    assert unsupported(2 * tokens[1], width) is None and "fewer" in unsupported(3, width)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    keep = jnp.asarray([0.0, 1.25]) if drops else None
    drawn = (normal(*tokens), normal(*tokens).astype("bfloat16"), normal(*tokens), normal(width))
    args = (drawn[0].astype(stream), drawn[1], drawn[2].astype(stream), drawn[3], keep)
    with abstract_h100(), interpreted():
        run = jax.jit(lambda *a: norm_gradient(*a, eps=1e-6, interpret=True))
        total, half = jax.device_get(run.trace(*args).lower().compile()(*args))
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), args)
        wanted = jax.device_get(xla.norm_gradient(*wide, 1e-6))
    assert total.dtype == stream and half.dtype == "bfloat16"
    assert max(relative_errors((total,), wanted[:1])) < (1e-6 if stream == "float32" else BOUND)
    assert max(relative_errors((half,), wanted[1:])) < BOUND
    if not drops:
        np.testing.assert_array_equal(half, total.astype(half.dtype))


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_gradients_lower_for_an_h100(stream):
    case = {**FULL, "e": 128, "stream": stream}
    objective = lambda args: jnp.sum(block(args, "auto", **case)[0])  # noqa: E731
    text = lower_for_h100(jax.grad(objective), abstract(case))
    for name in ("back_project", "norm_gradient", "back_gradients", "front_gradients"):
        assert launches(text, f"mixer_{name}") == 1
    assert launches(text, "mixer_back") == 0


@needs_mosaic
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"b": 2, "rows": 14, "columns": 14, "e": 384, "dtype": "float32"}, "not bfloat16"),
        ({"b": 128, "rows": 14, "columns": 14, "e": 200}, "whole blocks"),
    ],
)
def test_what_is_left_to_xla(case, reason, monkeypatch):
    from pallas_kernels.mixer_core import block_unsupported

    xz, residual, directions, *_ = abstract(case)
    grid = {"rows": case["rows"], "columns": case["columns"], "transposed": False, "method": "mean"}
    xz = jax.ShapeDtypeStruct(xz.shape, case.get("dtype", xz.dtype))
    with abstract_h100():
        assert reason in block_unsupported(xz, residual, directions.kernels, **grid)
        monkeypatch.setenv("FASTVIM_KERNELS", "off")
        assert "off" in block_unsupported(xz, residual, directions.kernels, **grid)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [
        {"e": 768},
        {"b": 1024, "rows": 7, "columns": 7},
        {"b": 8, "e": 768, "per_position": 8},
        {"b": 8, "e": 768, "per_position": 8, "stream": "bfloat16"},
        {"e": 768, "stream": "bfloat16"},
        {"e": 1536, "stream": "bfloat16"},
    ],
)
def test_what_one_kernel_does_not_cover_runs_joined_by_several(case):
    case = {"b": 128, "rows": 14, "columns": 14, "e": 384, **case}

    def value_and_gradient(args):
        return jax.value_and_grad(lambda args: jnp.sum(block(args, "auto", **case)[1] * 1.0))(args)

    text = lower_for_h100(value_and_gradient, abstract(case))
    for name in ("front", "back", "norm_gradient", "back_gradients", "front_gradients"):
        assert launches(text, f"mixer_{name}") == 1
    assert launches(text, "mixer_sum_norm") == 1
    assert launches(text, "mixer_back_project") == 0
    with abstract_h100(), pytest.raises(NotImplementedError, match="do not|position has"):
        jax.eval_shape(lambda args: block(args, "pallas", **case), abstract(case))


@needs_mosaic
def test_only_hopper_has_the_instructions(monkeypatch):
    from pallas_kernels.mixer_core import block_unsupported
    from tests.pallas_kernels import mosaic_support

    case = {"b": 128, "rows": 14, "columns": 14, "e": 384}
    xz, residual, directions, *_ = abstract(case)
    grid = {"rows": 14, "columns": 14, "transposed": False, "method": "mean"}
    for kind, missing in (
        ("NVIDIA H200", False),
        ("NVIDIA GH200 480GB", False),
        ("NVIDIA B200", True),
    ):
        device = dataclasses.replace(mosaic_support.abstract_device(), device_kind=kind)
        monkeypatch.setattr(mosaic_support, "abstract_device", lambda device=device: device)
        with abstract_h100():
            reason = block_unsupported(xz, residual, directions.kernels, **grid)
        assert ("matrix instructions" in (reason or "")) == missing, kind


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize(
    "more", [{}, {"stream": "bfloat16"}, {"rows": 9, "columns": 2, "per_position": 4}]
)
def test_derivative_rule(seed, more):
    """Compare a program traced for an H100 and run on this CPU, where XLA takes the kernels' place."""
    case = {**FULL, "e": 128, **more}
    args, bars = draw(np.random.default_rng(seed), **case)

    def run(args, bars, implementation):
        out, pull = jax.vjp(lambda args: block(args, implementation, **case), args)
        alone = block(args, implementation, **case)
        return alone, out, pull(bars)

    with abstract_h100():
        traced = jax.jit(lambda *a: run(*a, "auto")).trace(args, bars)
    assert "custom_vjp_call" in str(traced.jaxpr)
    got = traced.lower().compile()(args, bars)
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, bars))
        wanted = jax.jit(lambda *a: run(*a, "xla"))(*wide)
    assert max(relative_errors(got, wanted)) < 2e-2


@needs_mosaic
def test_pooled_tokens_are_rounded_unless_they_are_differentiated(seed):
    """Compare programs traced for an H100 and run on this CPU: gradients are those of float32 pooled tokens."""
    case = {"b": 64, "rows": 9, "columns": 8, "e": 128}
    args, bars = draw(np.random.default_rng(seed), **case)

    def results(dtype):
        more = case | {"pooled_dtype": dtype}
        with abstract_h100():
            alone = jax.jit(lambda args: block(args, "auto", **more)).trace(args)
            program = jax.jit(lambda *a: value_and_gradients(*a, "auto", more)).trace(args, bars)
        gradients = program.lower().compile()(args, bars)
        return jax.device_get((alone.lower().compile()(args), gradients))

    (out, wide), (rounded, differentiated) = results(None), results("bfloat16")
    jax.tree.map(np.testing.assert_array_equal, wide, differentiated)
    assert 1e-5 < max(relative_errors(rounded, out)) < BOUND
    with pytest.raises(ValueError, match="pooled_dtype"):
        block(args, "xla", **case, pooled_dtype="bfloat16", method="max")


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
def test_lowers_under_vmap():
    case = {**FULL, "e": 128}
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), abstract(case))
    text = lower_for_h100(jax.vmap(lambda args: block(args, "auto", **case)), args)
    assert launches(text, "mixer_back_project") == 1


def test_equations(seed):
    """Compare with the definition itself, in NumPy, behind the mixer's core."""
    from pallas_kernels.mixer_core import mixer_core

    case = {"b": 2, "rows": 3, "columns": 4, "e": 6}
    args, _ = draw(np.random.default_rng(seed), **case)
    with x64():
        args = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), args)
        xz, residual, directions, norm, projection, params = args
        got = jax.device_get(block(args, "xla", **case))
        g = np.asarray(
            mixer_core(
                xz, directions, norm, params, middle=core.middle, rows=3, columns=4,
                implementation="xla",
            )
        )  # fmt: skip
    total = np.asarray(residual) + g @ np.asarray(projection.weight).T
    scaling = 1 / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + 1e-6)
    wanted = (total, total * scaling * np.asarray(projection.gain))
    assert max(relative_errors(got, wanted)) < 1e-12


def test_bad_shapes_are_named(seed):
    args, _ = draw(np.random.default_rng(seed), 1, 3, 4, 6)
    *rest, projection, params = args
    with pytest.raises(ValueError, match="weight"):
        block((*rest, projection._replace(weight=projection.gain), params), "xla", 3, 4, b=1, e=6)
    with pytest.raises(ValueError, match="implementation"):
        block(args, "fast", 3, 4, b=1, e=6)
    with pytest.raises(ValueError, match="mixer_block: method"):
        block(args, "xla", 3, 4, b=1, e=6, method="median")
    with pytest.raises(ValueError, match="mixer_block: xz .* 3 x 5"):
        block(args, "xla", 3, 5, b=1, e=6)

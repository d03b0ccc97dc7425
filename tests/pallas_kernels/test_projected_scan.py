"""Projections and scans as one kernel: interpreted against float64, lowered for an H100, and its derivative rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.selective_scan import (
    bidirectional_scan,
    instead,
    projected,
    projected_scan,
)
from pallas_kernels.selective_scan import scan_weights as weights_of
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import x64

BOUND = 1e-3  # of TF32
GRADIENT_BOUND = 1e-2  # of TF32, behind which gradients are computed as for exact results
EXACT = 1e-4  # against the same roundings in float64, of which a few fall to the other side
HALF = 4e-3  # of results in bfloat16
STATES = 16


def draw(rng, b, l, e, rank=12):
    """Draw tokens and the original parameters: kernels of x_proj and dt_proj, bias and A."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = (
        normal(2, e, rank + 2 * STATES) / e**0.5,
        normal(2, rank, e) / rank**0.5,
        normal(2, e) - 2,
        -jnp.exp(normal(2, e, STATES)),
    )
    return normal(2, b, l, e), params


def step_by_step(params, u, known=None):
    x_proj, dt_proj, bias, A = params
    rank, missing = dt_proj.shape[1], -dt_proj.shape[1] % projected.RANK_MULTIPLE
    zeros = jnp.zeros((*x_proj.shape[:2], missing), x_proj.dtype)
    x_proj = jnp.concatenate([x_proj[..., :rank], zeros, x_proj[..., rank:]], axis=-1)
    dt_proj = jnp.pad(dt_proj, ((0, 0), (0, missing), (0, 0)))
    rank += missing
    multiply = lambda x, w: jnp.einsum("dbli,dio->dblo", x, w, precision="highest")  # noqa: E731
    x = multiply(u, x_proj)
    if known is not None:
        x = instead(x, known.columns)
    BC = jnp.stack(jnp.split(x[..., rank:], 2, axis=-1))
    delta = multiply(x[..., :rank], dt_proj)
    if known is not None:
        delta, BC = instead(delta, known.delta), instead(BC, known.BC)
    B, C = BC
    return bidirectional_scan(u, delta, A, B, C, delta_bias=bias, implementation="xla")


def run(args, implementation, **more):
    u, params = args
    more |= {"step_by_step": step_by_step, "implementation": implementation}
    return projected_scan(u, weights_of(*params), params, **more)


def wanted_of(args):
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), args)
        return jax.device_get(step_by_step(wide[1], wide[0]))


def defined_of(args):
    """Compute what the kernel must compute, its rounding of operands included, in float64."""
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), args)
        weights = jax.tree.map(lambda x: x.astype("float64"), weights_of(*args[1]))
        return jax.device_get(projected.xla(wide[0], weights))


def gradients_of(args, implementation, bars):
    """Return the outputs and the gradients of tokens and parameters, for cotangents `bars` of the outputs."""
    out, pull = jax.vjp(lambda args: run(args, implementation), args)
    return out, pull(bars)


def wanted_gradients_of(args, bars):
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, bars))
        out, pull = jax.vjp(lambda args: step_by_step(args[1], args[0]), wide[0])
        return jax.device_get((out, pull(wide[1])))


def shapes(b, l, e, rank=12):
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), 1, l, e, rank))
    return jax.ShapeDtypeStruct((2, b, l, e), jnp.float32), args[1]


CUTS = [
    {"images": 2, "warpgroups": 2, "part": 128, "slots": 2},
    {"images": 2, "warpgroups": 1, "part": 64, "slots": 3},
    {"images": 1, "warpgroups": 1, "splits": 2, "part": 32, "slots": 2},
]
NAMES = ["two images", "an image a warpgroup", "split channels"]


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize("cut", CUTS, ids=NAMES)
def test_kernel(seed, monkeypatch, cut):
    """Compare odd batches, which leave a thread block with one image; the rank is filled up."""
    from pallas_kernels.selective_scan import mosaic_projected

    rng = np.random.default_rng(seed)
    b, l, rank = cut["images"] * 2 - 1, int(rng.choice([7, 14, 16, 32])), int(rng.choice([4, 24]))
    y_dtype = str(rng.choice(["float32", "bfloat16"]))
    print(b, l, rank, y_dtype)
    args = draw(rng, b, l, 256, rank)
    padded = -(-rank // 16) * 16
    whole = {"batch": b, "lines": l, "width": 256, "rank": padded, "splits": 1} | cut
    whole = mosaic_projected.Cut(**whole)
    monkeypatch.setattr(mosaic_projected, "choose_cut", lambda *sizes: whole)
    with abstract_h100(), interpreted():
        call = jax.jit(lambda args: run(args, "pallas", y_dtype=y_dtype))
        got = jax.device_get(call.trace(args).lower().compile()(args))
    assert {y.dtype.name for y in got} == {y_dtype}
    half = y_dtype == "bfloat16"
    assert max(relative_errors(got, wanted_of(args))) < (HALF if half else BOUND)
    assert max(relative_errors(got, defined_of(args))) < (HALF if half else EXACT)


def wanted_of_rounded(u, params):
    """Compute in float64 what tokens and weights that are rounded to bfloat16 say, p not rounded."""
    with x64():
        weights = weights_of(*params)
        project, step = (w.astype("bfloat16") for w in weights[:2])
        project, step, bias, A, u = (
            jnp.asarray(np.asarray(x, np.float64)) for x in (project, step, *weights[2:], u)
        )
        p, B, C = jnp.split(
            jnp.einsum("dble,dce->dblc", u, project),
            [step.shape[-1], step.shape[-1] + STATES],
            axis=-1,
        )
        delta = jnp.einsum("dblr,der->dble", p, step)
        more = {"delta_bias": bias, "implementation": "xla"}
        return jax.device_get(bidirectional_scan(u, delta, A, B, C, **more))


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize("cut", CUTS[:2], ids=NAMES[:2])
def test_kernel_of_rounded_tokens(seed, monkeypatch, cut):
    """Compare kernel and definition with float64 for bfloat16 tokens, of which some are rows that no image has."""
    from pallas_kernels.selective_scan import mosaic_projected

    rng = np.random.default_rng(seed)
    b, l, rank = cut["images"] * 2 - 1, int(rng.choice([7, 14, 16, 32])), int(rng.choice([4, 24]))
    print(b, l, rank)
    u, params = draw(rng, b, l, 256, rank)
    u = u.astype("bfloat16")
    whole = {"batch": b, "lines": l, "width": 256, "rank": -(-rank // 16) * 16, "splits": 1} | cut
    whole = mosaic_projected.Cut(**whole, narrow=True)
    monkeypatch.setattr(mosaic_projected, "choose_cut", lambda *sizes: whole)
    with abstract_h100(), interpreted():
        call = jax.jit(lambda args: run(args, "pallas", y_dtype="float32"))
        got = jax.device_get(call.trace((u, params)).lower().compile()((u, params)))
    defined = jax.jit(lambda u: projected.xla(u, weights_of(*params), "float32"))(u)
    wanted = wanted_of_rounded(u, params)
    assert max(relative_errors(got, wanted)) < EXACT
    assert max(relative_errors(jax.device_get(defined), wanted)) < EXACT


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize("cut", CUTS, ids=NAMES)
def test_kernel_keeps_what_gradients_read(seed, monkeypatch, cut):
    """Compare outputs and gradients of a kernel that writes Δ, B, C and columns: lines of 8 to 16, an odd batch."""
    from pallas_kernels.selective_scan import mosaic_projected

    rng = np.random.default_rng(seed)
    b, l, rank = cut["images"] * 2 - 1, int(rng.integers(8, 17)), int(rng.choice([4, 24]))
    print(b, l, rank)
    args = draw(rng, b, l, 256, rank)
    bars = tuple(jnp.asarray(rng.standard_normal((b, l, 256)), jnp.float32) for _ in range(2))
    padded = -(-rank // 16) * 16
    whole = {"batch": b, "lines": l, "width": 256, "rank": padded, "splits": 1} | cut
    whole = mosaic_projected.Cut(**whole)
    monkeypatch.setattr(mosaic_projected, "choose_cut", lambda *sizes: whole)
    with abstract_h100(), interpreted():
        program = jax.jit(lambda args, bars: gradients_of(args, "pallas", bars))
        got = jax.device_get(program.trace(args, bars).lower().compile()(args, bars))
    assert max(relative_errors(got, wanted_gradients_of(args, bars))) < GRADIENT_BOUND


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_definition(seed):
    """Compare the equations that define the kernel with the step-by-step ones: they differ by rounding only.

    FastVim-T's lengths and rank: of few tokens and channels one draw in twenty has an error beyond the bound.
    """
    args = draw(np.random.default_rng(seed), 4, 14, 128)
    got = projected.xla(args[0], weights_of(*args[1]))
    errors = relative_errors(jax.device_get(got), wanted_of(args))
    assert 1e-5 < max(errors) < BOUND


@needs_mosaic
@pytest.mark.parametrize(
    ("batch", "lines", "width", "rank"),
    [(128, 14, 384, 12), (128, 14, 768, 24), (1, 14, 384, 12), (7, 7, 384, 12),
     (32, 32, 384, 12), (8, 64, 384, 12), (128, 14, 1536, 48), (1, 14, 1536, 48)],
)  # fmt: skip
def test_every_size_has_a_cut(batch, lines, width, rank):
    """Cut the models' sizes: each thread block has some of the channels and images, and none is left out.

    At batch 128, two images of bfloat16 tokens were the fastest for FastVim-T, -S and -B.
    """
    from pallas_kernels.selective_scan.mosaic_projected_cut import choose_cut

    padded = -(-rank // 16) * 16
    for narrow in (False, True):
        cut = choose_cut(batch, lines, width, padded, narrow)
        assert cut is not None and cut.unsupported() is None
        assert cut.blocks * cut.splits * 128 == width
        assert cut.groups * cut.images >= batch > (cut.groups - 1) * cut.images
    if batch == 128:
        assert (cut.images, cut.splits, cut.warpgroups) == (2, 1, 3)


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_lowers_for_an_h100():
    """Lower under vmap, inside a scan and in the forward pass of a gradient, if it has 8 to 16 steps."""
    args = shapes(4, 14, 384)
    assert launches(lower_for_h100(lambda a: run(a, "auto"), args), "projected_scan") == 1
    u, params = args
    several = jax.ShapeDtypeStruct((3, *u.shape), u.dtype)

    def vmapped(u, params):
        return jax.vmap(lambda u: run((u, params), "auto"))(u)

    assert launches(lower_for_h100(vmapped, several, params), "projected_scan") == 1

    def scanned(u, params):
        return lax.scan(lambda u, _: (jnp.stack(run((u, params), "auto")), None), u, None, 3)[0]

    assert launches(lower_for_h100(scanned, u, params), "projected_scan") == 1
    loss = lambda a: sum(jnp.sum(y.astype("float32")) for y in run(a, "auto"))  # noqa: E731
    assert launches(lower_for_h100(jax.grad(loss), args), "projected_scan") == 1
    assert launches(lower_for_h100(jax.grad(loss), shapes(4, 6, 384)), "projected_scan") == 0


@needs_mosaic
@pytest.mark.parametrize(("width", "rank"), [(384, 12), (768, 24), (1536, 48)], ids=list("TSB"))
def test_rounded_tokens_lower_for_an_h100(width, rank):
    """Lower FastVim's sizes at 224 px for bfloat16 tokens: one kernel, and none of it where a gradient is asked for."""
    u, params = shapes(128, 14, width, rank)
    args = jax.ShapeDtypeStruct(u.shape, jnp.bfloat16), params
    assert launches(lower_for_h100(lambda a: run(a, "auto"), args), "projected_scan") == 1
    loss = lambda p, u: sum(jnp.sum(y.astype("float32")) for y in run((u, p), "auto"))  # noqa: E731
    text = lower_for_h100(jax.grad(loss), params, args[0])
    assert launches(text, "projected_scan") == 0


@needs_mosaic
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [((1, 14, 192), "whole blocks"), ((1, 72, 384), "do not fit"), ((1, 7, 1536), "more than 768")],
)
def test_what_is_left_to_the_steps(sizes, reason, monkeypatch):
    u, params = shapes(*sizes)
    weights = jax.eval_shape(weights_of, *params)
    with abstract_h100():
        assert reason in projected.projected_unsupported(u, weights)
        few = weights._replace(A=jax.ShapeDtypeStruct((2, sizes[2], 4), jnp.float32))
        assert "4 states" in projected.projected_unsupported(u, few)
        half = jax.ShapeDtypeStruct(u.shape, jnp.float16)
        assert "not float32" in projected.projected_unsupported(half, weights)
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(lambda a: run(a, "pallas"), (u, params))
        monkeypatch.setenv("FASTVIM_KERNELS", "off")
        assert "off" in projected.projected_unsupported(u, weights)
    text = lower_for_h100(lambda a: run(a, "auto"), (u, params))
    assert launches(text, "projected_scan") == 0


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
@pytest.mark.parametrize("steps", [6, 9], ids=["step by step", "kept"])
def test_derivative_rule(seed, steps):
    """Compare a program traced for an H100 and run on this CPU, where XLA takes the kernel's place."""
    args = draw(np.random.default_rng(seed), 3, steps, 128)

    def values_and_gradients(args, implementation):
        out, pull = jax.vjp(lambda args: run(args, implementation), args)
        return run(args, implementation), out, pull(tuple(map(jnp.cos, out)))

    with abstract_h100():
        traced = jax.jit(lambda a: values_and_gradients(a, "auto")).trace(args)
    assert "custom_vjp_call" in str(traced.jaxpr)
    got = traced.lower().compile()(args)
    wanted = jax.jit(lambda a: values_and_gradients(a, "xla"))(args)
    assert max(relative_errors(got[0], wanted[0])) < BOUND
    bound = GRADIENT_BOUND if steps in projected.KEPT_STEPS else 1e-5
    assert max(relative_errors(got[1:], wanted[1:])) < bound


def test_bad_shapes_are_named(seed):
    u, params = draw(np.random.default_rng(seed), 1, 3, 8)
    weights = weights_of(*params)
    call = lambda u, weights, name: projected_scan(  # noqa: E731
        u, weights, params, step_by_step=step_by_step, implementation=name
    )
    with pytest.raises(ValueError, match=r"weights\.bias"):
        call(u, weights._replace(bias=weights.bias[:, 1:]), "xla")
    with pytest.raises(ValueError, match=r"weights\.project"):
        call(u[..., 1:], weights, "xla")
    with pytest.raises(ValueError, match="implementation"):
        call(u, weights, "fast")

"""Gradients of projections and scans whose results are known: interpreted against float64, and lowered for an H100."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.selective_scan import (
    known_scan,
    known_scan_unsupported,
    projected_scan,
)
from pallas_kernels.selective_scan import scan_weights as weights_of
from tests.pallas_kernels import test_projected_scan as projected
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)

BOUND = 5e-3  # of operands rounded to bfloat16
TF32 = 1e-3  # of operands that are truncated
SAME = 2e-6  # against the same rounding of operands in float64
KERNELS = ("selective_scan_gradients", "projection_gradients", "projection_weight_gradients")


def step_by_step(params, u, known=None, *, always=False):
    """Run `known_scan` where results are known."""
    if known is None:
        return projected.step_by_step(params, u)
    x_proj, dt_proj, bias, A = params
    return known_scan(always, u, x_proj, dt_proj, A, bias, known)


def run(args, implementation="auto"):
    u, params = args
    always = implementation == "pallas"
    steps = functools.partial(step_by_step, always=always)
    more = {"step_by_step": steps, "implementation": implementation}
    return projected_scan(u, weights_of(*params), params, **more)


def gradients_of(args, implementation, bars):
    """Return the outputs and the gradients of tokens and parameters, for cotangents `bars` of the outputs."""
    out, pull = jax.vjp(lambda args: run(args, implementation), args)
    return out, pull(bars)


def draw(rng, b, l, e, rank=16):
    """Draw arguments, whose dt_proj has more rows than are read, and cotangents."""
    u, (x_proj, dt_proj, bias, A) = projected.draw(rng, b, l, e, rank)
    bars = tuple(jnp.asarray(rng.standard_normal((b, l, e)), jnp.float32) for _ in "fb")
    return (u, (x_proj, dt_proj, bias, A)), bars


@functools.lru_cache
def _known_of(seed, b, l, e):
    """Draw arguments, and compute in float64 what is known and the gradients."""
    from pallas_kernels.selective_scan.projected import Known
    from tests.support import x64

    args, bars = draw(np.random.default_rng(seed), b, l, e)
    wanted = projected.wanted_gradients_of(args, bars)[1][0]
    with x64():
        u, x_proj, dt_proj = (np.asarray(x, np.float64) for x in (args[0], *args[1][:2]))
        columns = np.einsum("dble,dec->dblc", u, x_proj)
        delta = np.einsum("dblr,dre->dble", columns[..., :16], dt_proj)
    known = Known(delta, columns, np.stack([columns[..., 16:32], columns[..., 32:]]))
    known = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), known)
    (u, (x_proj, dt_proj, bias, A)), more = args, jnp.full((2, 32, e), jnp.nan)
    dt_proj = jnp.concatenate([dt_proj, more], axis=1)  # rows of which nothing is read
    return (u, x_proj, dt_proj, A, bias, known), bars, wanted


def check_gradients(seed, b, l, e):
    args, bars, wanted = _known_of(seed, b, l, e)

    def gradients(args, bars):
        return jax.vjp(lambda *a: known_scan(True, *a, args[-1]), *args[:-1])[1](bars)

    with abstract_h100(), interpreted():
        got = jax.jit(gradients).trace(args, bars).lower().compile()(args, bars)
    u, x_proj, dt_proj, A, bias = jax.device_get(got)
    assert not dt_proj[:, 16:].any()
    assert (x_proj.dtype, u.dtype) == ("float32", "float32")
    errors = relative_errors((u, (x_proj, dt_proj[:, :16], bias, A)), wanted)
    print(errors)
    assert errors[0] < TF32
    assert max(errors) < BOUND


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize("sizes", [(4, 16), (16, 12)], ids=str)
def test_gradients(seed, sizes):
    """Compare the kernels' gradients with those of the equations in float64."""
    check_gradients(seed, *sizes, 192)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
def test_a_share_that_does_not_cut_into_tiles(seed):
    """Compute a device's gradients where only the whole batch is made of tiles of 64 tokens."""
    check_gradients(seed, 3, 9, 64)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize("sizes", [(128, 384, 16, 2, 48), (64, 768, 32, 3, 64)], ids=str)
def test_gradients_of_tokens(seed, sizes):
    """Compare both models' cuts: two and four warpgroups. Rows of W_Δ behind the rank are NaN."""
    from pallas_kernels.selective_scan.mosaic_projection_gradients import (
        choose_cut,
        projection_gradients,
    )

    t, e, rank, shares, rows = sizes
    cut = choose_cut(t, e, rank, shares)
    assert (cut.warpgroups, cut.splits) == ({384: 2, 768: 4}[e], 2)
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    rounded = lambda x: lax.reduce_precision(x, 8, 10)  # noqa: E731
    step = rounded(normal(2, rank, e)) / 16
    args = (
        rounded(normal(2, t, e)),
        normal(shares, 2 * t, 2, 16),
        normal(2, t, e),
        jnp.concatenate([step, jnp.full((2, rows - rank, e), jnp.nan)], axis=1),
        rounded(normal(2, e, rank + 32)),
    )
    with abstract_h100(), interpreted():
        kernel = jax.jit(lambda *a: projection_gradients(*a, cut, interpret=True))
        got = kernel.trace(*args).lower().compile()(*args)
    delta, bc, u, _, project = (np.asarray(x, np.float64) for x in args)
    bc = bc.sum(0).reshape(2, t, 32)
    of_rank = np.einsum("dte,dre->dtr", delta, np.asarray(step, np.float64))
    columns = np.concatenate([of_rank, bc], axis=-1)
    # Columns are rounded to TF32.
    wanted = u + np.einsum("dtc,dec->dte", np.asarray(got[1], np.float64), project), columns
    errors = relative_errors(tuple(got), wanted)
    print(errors)
    assert errors[0] < SAME
    assert errors[1] < TF32


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize("sizes", [(192, 64, 32), (384, 128, 16), (320, 64, 16)], ids=str)
def test_gradients_of_weights(seed, sizes):
    """Compare sums over one, two and five shares of the tokens."""
    from pallas_kernels.selective_scan.mosaic_projection_weights import weight_gradients

    t, e, rank = sizes
    rng = np.random.default_rng(seed)
    draw = lambda width: jnp.asarray(rng.standard_normal((2, t, width)), jnp.float32)  # noqa: E731
    args = draw(e), draw(rank + 32), draw(e), draw(rank + 32)
    with abstract_h100(), interpreted():
        kernel = jax.jit(lambda *a: weight_gradients(*a, rank=rank, interpret=True))
        got = kernel.trace(*args).lower().compile()(*args)
    assert got[0].shape[0] == got[1].shape[0] == {192: 1, 384: 2, 320: 5}[t]
    half = [np.asarray(x.astype(jnp.bfloat16), np.float64) for x in args]
    u, columns_bar, delta_bar, columns = half
    wanted = (
        np.einsum("dte,dtc->dec", u, columns_bar),
        np.einsum("dte,dtr->dre", delta_bar, columns[..., :rank]),
    )
    errors = relative_errors(tuple(np.asarray(x).sum(0) for x in got), wanted)
    print(errors)
    assert max(errors) < SAME


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_lowers_for_an_h100():
    """Lower the gradients alone, under vmap, and for FastVim-S; unless tokens do not cut into tiles."""

    def one(args):
        return sum(map(jnp.sum, run(args)))

    def lowered(b, l, e, rank=16, loss=one):
        text = lower_for_h100(jax.grad(loss), projected.shapes(b, l, e, rank))
        return [launches(text, kernel) for kernel in KERNELS]

    assert lowered(64, 14, 384) == [1, 1, 1]
    assert lowered(64, 14, 768, 32) == [1, 1, 1]

    def several(args):
        u, params = args
        return jnp.sum(jax.vmap(lambda scale: one((scale * u, params)))(jnp.ones(3)))

    assert lowered(64, 8, 384, loss=several) == [1, 1, 1]
    # What a device has of a batch: the scan's gradients alone.
    assert lowered(9, 14, 384) == [1, 0, 0]


@needs_mosaic
def test_what_is_left_to_xla():
    def reason(b, l, e, columns, dtype="float32"):
        u = jax.ShapeDtypeStruct((2, b, l, e), dtype)
        with abstract_h100():
            return known_scan_unsupported(u, columns)

    assert reason(128, 14, 384, 48) is reason(128, 14, 768, 64) is None
    assert "tiles" in reason(127, 14, 384, 48)
    assert "tiles" in reason(128, 14, 512, 48)
    assert "rank" in reason(128, 14, 384, 80)
    assert "rank" in reason(128, 14, 384, 44)
    assert "not float32" in reason(128, 14, 384, 48, "bfloat16")

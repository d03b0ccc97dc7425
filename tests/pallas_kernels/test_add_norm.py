"""`add_norm`, residual sum and norm: interpreted against float64, its gradients, and lowered for an H100."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mixer_core import add_norm, add_norm_unsupported, norm_stream
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


BOUND = 1e-2  # of bfloat16


def draw(rng, shape, *, stream="float32", drops=False, layer=False, biased=False):
    """Draw update, residual, gain, shift, bias, keep; tokens of a LayerNorm have a mean."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    shift, bias = (normal(shape[2]) if there else None for there in (layer, biased))
    keep = jnp.asarray(rng.choice([0.0, 1.25], shape[0]), jnp.float32) if drops else None
    residual = normal(*shape) + (2.0 if layer else 0.0)
    update = normal(*shape).astype("bfloat16")
    return update, residual.astype(stream), normal(shape[2]), shift, bias, keep


def plain(update, residual, gain, shift, bias, keep, xp=jnp):
    """Return the sum and the normalised tokens, in the widest dtype of the arguments."""
    factor = 1.0 if keep is None else keep[:, None, None]
    total = residual + factor * (update if bias is None else update + bias)
    centred = total if shift is None else total - xp.mean(total, axis=-1, keepdims=True)
    normed = centred / xp.sqrt(xp.mean(centred**2, axis=-1, keepdims=True) + 1e-6) * gain
    return total, normed if shift is None else normed + shift


def in_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def value_and_gradients(update, residual, gain, shift, bias, keep):
    """Return what `add_norm` returns, and its gradients along their cosines."""
    run = lambda *args: add_norm(*args, keep=keep)  # noqa: E731
    out, pull = jax.vjp(run, update, residual, gain, shift, bias)
    return out, pull(jax.tree.map(jnp.cos, out))


KINDS = [
    {},
    {"drops": True},
    {"layer": True},
    {"layer": True, "biased": True, "stream": "bfloat16"},
    {"layer": True, "biased": True, "drops": True},
]


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize("width", [64, 192, 384, 1280])
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", KINDS[:3] + KINDS[4:])
def test_sum_and_norm_in_the_interpreter(seed, options, stream, width):
    """Compare with float64. The tokens of four warps are of two images, and the last four overlap others."""
    from pallas_kernels.mixer_core.mosaic_sum_norm import sum_norm, unsupported

    rng = np.random.default_rng(seed)
    shape = (int(rng.choice([1, 3, 4])), int(rng.choice([5, 7, 12])), width)
    print(shape)
    assert unsupported(shape[0] * shape[1], width) is None
    args = draw(rng, shape, **{**options, "stream": stream})
    with abstract_h100(), interpreted():
        run = jax.jit(lambda *a: sum_norm(*a, dtype="bfloat16", eps=1e-6, interpret=True))
        total, normed = jax.device_get(run.trace(*args).lower().compile()(*args))
    assert total.dtype == stream and normed.dtype == "bfloat16"
    wanted = plain(*in_float64(args), xp=np)
    assert max(relative_errors(total, wanted[0])) < (1e-6 if stream == "float32" else BOUND)
    assert max(relative_errors(normed, wanted[1])) < BOUND
    # The norm reads the rounded sum, so that whoever reads the stream later finds the same numbers.
    again = plain(np.zeros(shape), *in_float64((total, *args[2:4])), None, None, xp=np)[1]
    assert max(relative_errors(normed, again)) < 3e-3


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize("width", [64, 192, 768])
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", KINDS[:3] + KINDS[4:])
def test_gradient_in_the_interpreter(seed, options, stream, width, monkeypatch):
    """Compare with float64, where a thread block takes several turns, and where a few tokens are left for one."""
    from pallas_kernels.mixer_core import mosaic_norm_gradient as kernel

    monkeypatch.setattr(kernel, "SUMMING", 2)
    kernel.norm_gradient.clear_cache()
    rng = np.random.default_rng(seed)
    shape = (int(rng.choice([1, 3])), int(rng.choice([7, 21, 24])), width)
    print(shape)
    layer = "layer" in options
    args = draw(rng, shape, **{**options, "stream": stream})
    (normed_bar, total_bar, *_), (_, total, gain, _, _, keep) = (
        draw(rng, shape, stream=stream),
        args,
    )
    with abstract_h100(), interpreted():
        run = jax.jit(lambda *a: kernel.norm_gradient(*a, eps=1e-6, layer=layer, interpret=True))
        given = total_bar, normed_bar, total, gain, keep
        bar, rounded, *parts = jax.device_get(run.trace(*given).lower().compile()(*given))
    kernel.norm_gradient.clear_cache()
    assert bar.dtype == stream and rounded.dtype == "bfloat16"
    # The gradient of r + n(r), and those of gain, shift and of a bias.
    with x64():
        wide = jax.tree.map(jnp.asarray, in_float64((total_bar, normed_bar, total, gain, keep)))
        zeros = jnp.zeros(width)
        shift = zeros if layer else None
        run = lambda r, gain, shift: plain(0 * r, r, gain, shift, None, None)  # noqa: E731
        out_bar, gain_bar, shift_bar = jax.vjp(run, *wide[2:4], shift)[1](wide[:2])
        scaled = out_bar if keep is None else out_bar * wide[4][:, None, None]
        wanted = jax.device_get((out_bar, scaled, gain_bar, shift_bar, scaled.sum((0, 1))))
    assert max(relative_errors(bar, wanted[0])) < (1e-6 if stream == "float32" else BOUND)
    assert max(relative_errors(rounded, wanted[1])) < BOUND
    if keep is None:
        np.testing.assert_array_equal(rounded, bar.astype(rounded.dtype))
    if layer:
        sums = list(parts[0].sum(0))
        assert max(relative_errors(sums, list(wanted[2:]))) < 1e-5


@pytest.mark.parametrize("options", KINDS)
def test_equals_plain_jax(seed, options):
    """Compare value and gradients, traced for an H100 and run on this CPU, where XLA takes the kernels' place."""
    args = draw(np.random.default_rng(seed), (4, 3, 128), **options)
    with abstract_h100():
        got = jax.jit(value_and_gradients).trace(*args).lower().compile()(*args)
    wide = jax.tree.map(lambda x: x.astype("float32"), args)
    out, pull = jax.vjp(lambda *five: plain(*five, wide[5]), *wide[:5])
    wanted = out, pull(jax.tree.map(jnp.cos, out))
    assert [x.dtype for x in jax.tree.leaves(got[1])] == [
        x.dtype for x in jax.tree.leaves(args[:5])
    ]
    assert max(relative_errors(got, wanted)) < 2e-2


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((4, 3, 128), None),
        ((1, 197, 192), None),
        ((1, 3, 128), "3 tokens"),
        ((4, 3, 96), "96"),
        ((4, 3, 1344), "1344"),
    ],
)
def test_what_runs_as_kernels(shape, reason, layer):
    args = draw(np.random.default_rng(0), shape, layer=layer, biased=layer)
    text = lower_for_h100(value_and_gradients, *args)
    for kernel in ("mixer_sum_norm", "mixer_norm_gradient"):
        assert launches(text, kernel) == (reason is None)
    with abstract_h100():
        found = add_norm_unsupported(*args[:2], layer=layer)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
def test_norm_of_a_stream_alone(seed, stream):
    """Normalise without an update: in the interpreter, and its gradient, for which XLA takes the kernel's place."""
    from pallas_kernels.mixer_core.mosaic_sum_norm import sum_norm

    rng = np.random.default_rng(seed)
    _, residual, gain, shift, *_ = draw(rng, (3, 5, 192), stream=stream, layer=True)
    options = {"dtype": "bfloat16", "eps": 1e-6, "interpret": True}
    given = None, residual, gain, shift, None, None
    with abstract_h100(), interpreted():
        run = jax.jit(lambda *a: sum_norm(*a, **options))
        same, normed = jax.device_get(run.trace(*given).lower().compile()(*given))
    np.testing.assert_array_equal(same, residual)
    wanted = plain(0.0, *in_float64((residual, gain, shift)), None, None, xp=np)[1]
    assert normed.dtype == "bfloat16" and max(relative_errors(normed, wanted)) < BOUND

    def pulled(function):
        out, pull = jax.vjp(function, residual, gain, shift)
        return out, pull(jax.tree.map(jnp.cos, out))

    ours = lambda *args: norm_stream(*args, dtype="bfloat16")  # noqa: E731
    reference = lambda r, *args: plain(0 * r, r, *args, None, None)  # noqa: E731
    with abstract_h100():
        traced = jax.jit(lambda: pulled(ours)).trace()
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert launches(text, "mixer_sum_norm") == launches(text, "mixer_norm_gradient") == 1
    assert (
        max(relative_errors(*map(jax.tree.leaves, (traced.lower().compile()(), pulled(reference)))))
        < 2e-2
    )


@pytest.mark.parametrize("kernel", ["sum_norm", "norm_gradient"])
def test_kernels_under_vmap(seed, kernel):
    """Compare two examples at once in the interpreter with each by itself, with a token left for one thread block."""
    from pallas_kernels.mixer_core import mosaic_norm_gradient, mosaic_sum_norm

    rng = np.random.default_rng(seed)
    drawn = [draw(rng, (1, 9, 64), layer=True, biased=True) for _ in range(2)]
    if kernel == "sum_norm":
        options = {"dtype": "bfloat16", "eps": 1e-6, "interpret": True}
        run = functools.partial(mosaic_sum_norm.sum_norm, **options)
    else:
        options = {"layer": True, "eps": 1e-6, "interpret": True}
        run = functools.partial(mosaic_norm_gradient.norm_gradient, **options)
        drawn = [(a[1], a[0], a[1] * 2, a[2], None) for a in drawn]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
    with abstract_h100(), interpreted():
        on = lambda f, args: jax.jit(f).trace(*args).lower().compile()(*args)  # noqa: E731
        got = jax.device_get(on(jax.vmap(run), stacked))
        wanted = [jax.device_get(on(run, args)) for args in drawn]
    jax.tree.map(lambda g, *w: np.testing.assert_array_equal(g, np.stack(w)), got, *wanted)


def test_bias_needs_a_shift():
    update, residual, gain, *_ = draw(np.random.default_rng(0), (1, 4, 64))
    with pytest.raises(ValueError, match="bias"):
        add_norm(update, residual, gain, None, gain)

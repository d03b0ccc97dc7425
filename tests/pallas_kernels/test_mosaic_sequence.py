"""The core of mixers that pool nothing without a GPU: in the interpreter against float64, and lowered for an H100."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels.mixer_core import Convolutions, Norm, sequence_core
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import x64


def middle(params, c):
    """Stand in for projections, scans and skips."""
    return tuple(jnp.tanh(c * params[:, None, None]))


def draw(rng, b, l, e, taps=4, dtype="float32"):
    """Draw arguments, and the gradient of the output."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    args = (
        normal(b, l, 2 * e).astype(dtype),
        Convolutions(normal(2, taps, e), normal(2, e)),
        Norm(normal(e), normal(e)),
        normal(2, e),
    )
    return args, normal(b, l, e).astype(dtype)


def value_and_gradients(args, out_bar, implementation, **options):
    run = lambda args: sequence_core(  # noqa: E731
        *args, middle=middle, implementation=implementation, **options
    )
    out, pull = jax.vjp(run, args)
    return out, pull(out_bar)[0]


def compare(monkeypatch, rng, bound, norm_kind="layer", **case):
    """Compare blocks of up to three small tiles, which follow one another."""
    from pallas_kernels.mixer_core import mosaic_sequence

    monkeypatch.setattr(mosaic_sequence, "tiles_of_a_block", lambda *_, **__: 3)
    monkeypatch.setattr(mosaic_sequence, "SEGMENTS", (int(rng.choice([8, 11])),))
    args, out_bar = draw(rng, **case)
    with abstract_h100(), interpreted():
        run = jax.jit(lambda a, g: value_and_gradients(a, g, "pallas", norm_kind=norm_kind))
        got = run.trace(args, out_bar).lower().compile()(args, out_bar)
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, out_bar))
        reference = jax.jit(lambda *a: value_and_gradients(*a, "xla", norm_kind=norm_kind))
        wanted = reference(*wide)
    assert max(relative_errors(got, wanted)) < bound


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_random_length(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    case = {name: int(rng.integers(1, top)) for name, top in (("b", 3), ("l", 26))}
    print(case)
    compare(monkeypatch, rng, 3e-6, e=128, **case)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [
        {"b": 2, "l": 1, "e": 128},  # shorter than the window
        {"b": 3, "l": 19, "e": 256, "taps": 3, "dtype": "bfloat16"},  # ragged in every respect
        {"b": 2, "l": 5, "e": 72},  # filled up with zeros
        {"b": 1, "l": 6, "e": 128, "norm_kind": "none"},
        pytest.param({"b": 1, "l": 6, "e": 200, "norm_kind": "rms"}, marks=pytest.mark.slow),
        pytest.param({"b": 1, "l": 34, "e": 768, "taps": 2}, marks=pytest.mark.slow),
        pytest.param({"b": 3, "l": 3, "e": 1536, "dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_cases(seed, monkeypatch, case):
    bound = 1e-2 if "dtype" in case else 3e-6
    compare(monkeypatch, np.random.default_rng(seed), bound, **case)


def shapes(b, l, e, dtype="float32"):
    """Return shapes of arguments and of the gradient of the output, without values."""
    drawn = jax.eval_shape(lambda: draw(np.random.default_rng(0), 1, 1, e, dtype=dtype))
    big = lambda x: jax.ShapeDtypeStruct((b, l, x.shape[2]), x.dtype)  # noqa: E731
    return jax.tree.map(lambda x: big(x) if x.shape[:2] == (1, 1) else x, drawn)


KERNELS = ("front", "back", "back_gradients", "front_gradients")


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [
        {"b": 128, "l": 197, "e": 384, "dtype": "bfloat16"},
        {"b": 2, "l": 16384, "e": 1536},
        {"b": 1, "l": 5, "e": 128},
        {"b": 2, "l": 17, "e": 192, "dtype": "bfloat16"},
    ],
)
def test_lowers_for_an_h100(case):
    text = lower_for_h100(lambda a, g: value_and_gradients(a, g, "auto"), *shapes(**case))
    for kernel in KERNELS:
        assert launches(text, f"mixer_sequence_{kernel}") >= 1
    # The gradient of x is written beside that of z.
    assert text.count("output_operand_alias<output_tuple_indices") == 1


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_vmap_remat_and_blocks_under_scan_lower_for_an_h100():
    (xz, *others), _ = shapes(4, 40, 128)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), others)

    def loss(xz, others):
        @jax.checkpoint
        def block(xz, others):
            out = sequence_core(xz, *others, middle=middle)
            return jnp.concatenate([out, out], -1), None

        return jnp.sum(jnp.sin(jax.lax.scan(block, xz, others)[0]))

    gradients = jax.vmap(jax.grad(loss, (0, 1)), (0, None))
    text = lower_for_h100(gradients, jax.ShapeDtypeStruct((2, *xz.shape), xz.dtype), stacked)
    for kernel in KERNELS:
        assert launches(text, f"mixer_sequence_{kernel}") >= 1


@needs_mosaic
def test_export_for_cuda(seed):
    args, out_bar = draw(np.random.default_rng(seed), 1, 9, 128)
    allowed = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(lambda a, g: value_and_gradients(a, g, "auto"))
    with abstract_h100():
        exported = export.export(run, platforms=["cuda"], disabled_checks=allowed)(args, out_bar)
    text = exported.mlir_module()
    for kernel in KERNELS:
        assert launches(text, f"mixer_sequence_{kernel}") >= 1


def test_xla_equals_the_equations(seed):
    """Compare the definition itself with a loop over tokens."""
    rng = np.random.default_rng(seed)
    b, l, e, taps = 2, 6, 5, 3
    (xz, convolutions, norm, params), _ = draw(rng, b, l, e, taps)
    got = sequence_core(xz, convolutions, norm, params, middle=middle, implementation="xla")
    xz, params = np.asarray(xz, np.float64), np.asarray(params, np.float64)
    kernels, biases = (np.asarray(v, np.float64) for v in convolutions)
    x, z = xz[..., :e], xz[..., e:]
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    s = np.zeros_like(x)
    for side, ahead in ((0, -1), (1, 1)):
        c = np.tile(biases[side], (b, l, 1))
        for t in range(l):
            for j in range(taps):
                seen = t + ahead * (taps - 1 - j)
                if 0 <= seen < l:
                    c[:, t] += kernels[side, j] * x[:, seen]
        s += np.tanh(silu(c) * params[side]) / 2
    s = (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-5)
    wanted = (s * np.asarray(norm.scale) + np.asarray(norm.shift)) * silu(z)
    assert max(relative_errors(got, wanted)) < 1e-5


def test_bad_calls():
    (xz, *rest), _ = draw(np.random.default_rng(0), 1, 3, 4)
    with pytest.raises(ValueError, match="twice the 4 channels"):
        sequence_core(xz[..., :6], *rest, middle=middle)
    with pytest.raises(ValueError, match="middle must return a pair of arrays of shape"):
        sequence_core(xz, *rest, middle=lambda _, c: (c[0, :, :, :1], c[1]))
    with pytest.raises(ValueError, match="implementation must be one of"):
        sequence_core(xz, *rest, middle=middle, implementation="cuda")
    with pytest.raises(NotImplementedError, match="cannot run here"):
        sequence_core(xz, *rest, middle=middle, implementation="pallas")


@needs_mosaic
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"e": 48}, "whole blocks of 128"),
        ({"e": 128, "taps": 9}, "not between 2 and 8"),
        ({"e": 128, "dtype": "float16"}, "float16"),
        ({"e": 8192}, "do not fit into shared memory"),
    ],
)
def test_what_the_kernels_do_not_take(case, reason):
    args, out_bar = draw(np.random.default_rng(0), 1, 3, **case)
    with abstract_h100(), pytest.raises(NotImplementedError, match=reason):
        value_and_gradients(args, out_bar, "pallas")
    text = lower_for_h100(lambda a, g: value_and_gradients(a, g, "auto"), args, out_bar)
    assert "mosaic" not in text

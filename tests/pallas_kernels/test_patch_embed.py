"""Patches, their product, positions and the first norm: interpreted against float64, and lowered for an H100."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.patch_embed import embed_patches, embed_patches_unsupported, mosaic
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
EPS = 0.25  # large enough to be missed


def draw(rng, b, rows, columns, outputs=64, patch=(4, 16), channels=3):
    """Draw images in bfloat16, the patches' weight, and the table of positions."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    p, q = patch
    images = normal(b, rows * p, columns * q, channels).astype("bfloat16")
    weight = normal(p, q, channels, outputs) / (p * q * channels) ** 0.5
    return images, weight, normal(rows, columns, outputs)


def wanted_of(images, weight, table, eps=EPS):
    """Compute tokens and normalised tokens in float64, from the definition: patch by patch."""
    images, weight, table = (np.asarray(x, np.float64) for x in (images, weight, table))
    weight = np.asarray(jnp.asarray(weight, "bfloat16"), np.float64)
    (p, q), (rows, columns) = weight.shape[:2], table.shape[:2]
    tokens = [
        np.einsum("bpqc,pqcd->bd", images[:, p * r : p * r + p, q * k : q * k + q], weight)
        + table[r, k]
        for r in range(rows)
        for k in range(columns)
    ]
    tokens = np.stack(tokens, axis=1)
    return tokens, tokens / np.sqrt(np.mean(tokens**2, axis=-1, keepdims=True) + eps)


def run(args, interpret, stream="float32", **work):
    """Run the kernel alone, with fields of its work changed."""
    from pallas_kernels.patch_embed.mosaic_embed import Work, embed

    images, weight, table = args
    p, q, channels, outputs = weight.shape
    sizes = (images.shape[0], *table.shape[:2], p, q * channels, outputs)
    matrix = weight.reshape(-1, outputs).astype(images.dtype)
    work = Work(*sizes, **work)
    assert work.unsupported() is None
    return tuple(
        embed(images, matrix, table, work, stream=jnp.dtype(stream), eps=EPS, interpret=interpret)
    )


# Of each case: batch, rows, columns, and what differs from `draw`'s defaults.
CASES = {
    "one tile": ((8, 8, 1), {}),
    "tiles overlap": ((6, 12, 2), {}),  # 72 lines of patches
    "a tile of 8 new lines, rows as few as a warpgroup ends": ((18, 4, 2), {}),
    "several tiles, one warpgroup": ((14, 12, 1), {"processors": 1000}),
    "two parts wait for their place": ((8, 8, 1), {"patch": (7, 16)}),
    "few numbers": ((8, 8, 2), {"patch": (2, 16), "channels": 1}),
    "whole tokens": ((8, 8, 1), {"outputs": 192}),
    "tokens of two thread blocks": ((8, 8, 1), {"outputs": 384}),
}


@pytest.mark.drawn
@needs_mosaic
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_kernel(seed, case, stream):
    """Compare with float64. The interpreter fills what no thread block writes with NaN."""
    sizes, options = CASES[case]
    options = dict(options)
    work = {"processors": options.pop("processors", 1)}
    args = draw(np.random.default_rng(seed), *sizes, **options)
    with abstract_h100(), interpreted():
        program = jax.jit(lambda *args: run(args, True, stream, **work))
        got = jax.device_get(program.trace(*args).lower().compile()(*args))
    assert [x.dtype for x in got] == [stream, "bfloat16"][: len(got)]
    assert len(got) == (1 if "two thread blocks" in case else 2)
    wanted = wanted_of(*args)
    errors = relative_errors(got, wanted[: len(got)])
    assert errors[0] < (BOUND if stream == "bfloat16" else 1e-5)
    assert max(errors) < BOUND


FASTVIM_T = (8, 14, 14, 192, (16, 16))


def embed_as(stream, implementation="auto"):
    return lambda *args: embed_patches(*args, stream=stream, eps=EPS, implementation=implementation)


@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
@pytest.mark.parametrize("traced_for_h100", [True, False])
@needs_mosaic
def test_xla_in_the_kernel_s_place(seed, stream, traced_for_h100):
    """Compare value and gradients with float64: traced for this CPU or an H100, and run on this CPU."""
    args = draw(np.random.default_rng(seed), 8, 8, 3)

    def value_and_gradients(*args):
        out, pull = jax.vjp(embed_as(stream), *args)
        return embed_as(stream)(*args), out, pull(jax.tree.map(jnp.cos, out))

    trace = jax.jit(value_and_gradients).trace
    with abstract_h100() if traced_for_h100 else contextlib.nullcontext():
        traced = trace(*args)
    value, out, gradients = traced.lower().compile()(*args)
    assert max(relative_errors((value, out), (wanted_of(*args),) * 2)) < BOUND
    assert [x.dtype for x in value] == [stream, "bfloat16"]
    with x64():
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
        _, pull = jax.vjp(embed_as("float64", "xla"), *wide)
        wanted = pull(tuple(jnp.asarray(np.cos(np.asarray(x, np.float64))) for x in out))
    assert max(relative_errors(gradients, tuple(wanted))) < 2e-2


@needs_mosaic
@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        (FASTVIM_T, {}, None),
        ((128, 14, 14, 384, (16, 16)), {}, None),  # S
        ((128, 14, 14, 768, (16, 16)), {}, None),  # B
        ((4, 14, 14, 192, (16, 16)), {}, "56 lines of patches are fewer than 64"),
        ((9, 14, 14, 192, (16, 16)), {}, "126 lines of patches are fewer than 64 or no multiple"),
        ((64, 2, 14, 192, (16, 16)), {}, "2 rows of patches"),
        ((8, 14, 14, 192, (14, 14)), {}, "42 numbers"),
        ((8, 14, 14, 192, (16, 128)), {}, "384 numbers"),
        ((8, 14, 14, 96, (16, 16)), {}, "96 channels"),
        (FASTVIM_T, {"dtype": "float32"}, "images of float32"),
        (FASTVIM_T, {"stream": "float64"}, "tokens of float64"),
    ],
)
def test_what_runs_as_a_kernel(sizes, options, reason):
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), *sizes))
    images = jax.ShapeDtypeStruct(args[0].shape, options.get("dtype", "bfloat16"))
    stream = options.get("stream", "bfloat16")
    with abstract_h100():
        found = embed_patches_unsupported(images, args[1], stream=stream)
    assert found is None if reason is None else reason in str(found)
    if stream != "float64":
        text = lower_for_h100(embed_as(stream), images, *args[1:])
        assert launches(text, "patch_embed") == (reason is None)


def test_only_hopper_gpus_run_it(monkeypatch):
    """Ask for this CPU, with kernels turned off, and for a later GPU, which lacks Hopper's matrix instructions."""
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), *FASTVIM_T))
    ask = lambda: embed_patches_unsupported(*args[:2], stream="bfloat16")  # noqa: E731
    assert "no GPU" in ask()
    with pytest.raises(NotImplementedError, match="no GPU"):
        jax.eval_shape(embed_as("bfloat16", "pallas"), *args)
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    monkeypatch.setattr(gpu, "wgmma_missing", lambda: "no wgmma")
    assert ask() == "no wgmma"
    monkeypatch.undo()
    monkeypatch.setenv("FASTVIM_KERNELS", "off")
    with abstract_h100():
        assert "off" in ask()


@needs_mosaic
def test_a_share_of_the_batch_decides(seed):
    """Embed by XLA where a device's share is too small, although the whole batch is not."""
    args = draw(np.random.default_rng(seed), 8, 8, 2)
    with abstract_h100():
        assert mosaic.unsupported(args[0], args[1], jnp.dtype("float32")) is None
        assert mosaic.unsupported(args[0][:4], args[1], jnp.dtype("float32")) is not None
        share = lambda *args: mosaic.embed(*args, stream=jnp.dtype("float32"), eps=EPS)  # noqa: E731
        got = jax.jit(share)(args[0][:4], *args[1:])
    assert max(relative_errors(got, wanted_of(args[0][:4], *args[1:]))) < BOUND


@needs_mosaic
def test_lowers_under_vmap_and_scan():
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), *FASTVIM_T))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), args)
    one = embed_as("bfloat16")
    for mapped in (jax.vmap(one), lambda *args: jax.lax.map(lambda args: one(*args), args)):
        assert launches(lower_for_h100(mapped, *args), "patch_embed") == 1


@needs_mosaic
def test_gradients_hold_no_kernel():
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), *FASTVIM_T))
    objective = lambda *args: jnp.sum(embed_as("bfloat16")(*args)[0].astype("float32"))  # noqa: E731
    assert launches(lower_for_h100(objective, *args), "patch_embed") == 1
    assert launches(lower_for_h100(jax.grad(objective, (1, 2)), *args), "patch_embed") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": (8, 33, 32, 3)}, "whole patches of 4 x 16"),
        ({"table": (8, 3, 64)}, "table must have shape"),
        ({"implementation": "cuda"}, "implementation must be one of"),
        ({"stream": "int32"}, "stream must be a dtype of floats, got 'int32'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    shapes = {"images": (8, 32, 32, 3), "weight": (4, 16, 3, 64), "table": (8, 2, 64)}
    arrays = {name: jnp.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        embed_patches(
            **arrays,
            implementation=change.get("implementation", "auto"),
            stream=change.get("stream", "float32"),
        )

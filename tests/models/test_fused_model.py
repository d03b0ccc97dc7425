"""Whole models whose mixers run the fused core: the kernels they launch, and their values."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.models import create_model
from pallas_kernels.selective_scan import projected
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import relative_error

pytestmark = needs_mosaic


def split(seed=0, **options):
    return nnx.split(create_model("fastvim_tiny_patch16_224", rngs=nnx.Rngs(seed), **options))


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize("batch", [1, 128])
def test_one_kernel_scans_both_directions_of_a_block(batch):
    depth = 3
    graphdef, params = split(depth=depth, fast=True)
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    forward = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
    text = lower_for_h100(forward, params, images)
    # Where tokens come in eights, in_proj is in the first kernel; out_proj, the residual sum and the next norm are in
    # the last one.
    eights = batch == 128
    for kernel in (
        "mixer_project_front" if eights else "mixer_front",
        "projected_scan",
        "mixer_back_project",
    ):
        assert launches(text, kernel) == depth
    assert launches(text, "selective_scan") == 0
    assert launches(text, "patch_embed") == int(eights)
    # Of each mixer in_proj, and patches, where no kernel has them; head.
    assert text.count("stablehlo.dot_general") == (0 if eights else depth + 1) + 1


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize(
    ("options", "taken"),
    [({"dtype": "bfloat16", "activations": "compute"}, {16, 32}), ({}, {12, 16, 32})],
    ids=["bfloat16", "float32"],
)
def test_what_is_taken_out_of_x_projs_columns(monkeypatch, options, taken):
    """Slice B and C as one array, and the steps' rank where dt_proj does not read all columns.

    Where one kernel does not do all of it, as in training.
    """
    monkeypatch.setattr(projected, "projected_unsupported", lambda u, weights: "not this time")
    graphdef, params = split(depth=2, blocks="unroll", **options)
    images = jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32)
    forward = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
    text = lower_for_h100(forward, params, images)
    widths = re.findall(r"stablehlo.slice .* -> tensor<2x(?:3x14|42)x(\d+)xb?f\d+>", text)
    assert set(map(int, widths)) == taken
    # Pooled tokens go as they are into a product of float32, or TF32, and are in float32 for the scan. Of half
    # precision is each block's Δ alone, since nothing is differentiated.
    assert re.search(r"\(tensor<2x3x14x384xf32>, tensor<2x384x\d+xf32>\)", text)
    rounded = re.findall(r"\(tensor<2x3x14x384xf32>\) -> tensor<2x3x14x384xbf16>", text)
    assert len(rounded) == (2 if options else 0)


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize("name", ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224"])
def test_what_kernels_return_is_not_written_into_stacks(name):
    """Count barriers after front, scan and back.

    Without them XLA runs each kernel twice where `lax.scan` keeps its results.
    """
    graphdef, params = nnx.split(create_model(name, rngs=nnx.Rngs(0), depth=1))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    text = lower_for_h100(lambda p, x: nnx.merge(graphdef, p)(x), params, images)
    assert text.count("stablehlo.optimization_barrier") == 4  # and B with C


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_directions_are_laid_together_once_for_all_blocks():
    def concatenations(depth):
        graphdef, params = split(depth=depth, blocks="unroll", embed_dim=64)
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        run = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
        return lower_for_h100(run, params, images).count("stablehlo.concatenate")

    assert concatenations(3) == concatenations(2) + 1  # of each block B and C


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        pytest.param({}, 1e-5, id="float32"),
        pytest.param({"dtype": "bfloat16"}, 2e-2, id="bfloat16"),
    ],
)
def test_fused_equals_plain(seed, options, bound):
    """Compare with the plain model. The program is traced for an H100 and run on this CPU.

    XLA takes the kernels' place, derivative rules included.
    """
    graphdef, params = split(
        seed, depth=2, embed_dim=64, image_size=48, patch_size=16, num_classes=7, **options
    )
    images = jax.random.normal(jax.random.key(seed), (2, 48, 48, 3))

    def run(params, images):
        out, pull = jax.vjp(lambda p: nnx.merge(graphdef, p)(images), params)
        return out, pull(jnp.cos(out))[0]

    with abstract_h100():
        traced = jax.jit(run).trace(params, images)
    got = traced.lower().compile()(params, images)
    wanted = jax.jit(lambda p, x: run(p, x))(params, images)
    assert max(relative_errors(got, wanted)) < bound


SMALL = {"depth": 2, "embed_dim": 64, "image_size": 48, "patch_size": 4, "num_classes": 7}
COMPUTE = {"dtype": "bfloat16", "activations": "compute"}


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize("blocks", ["unroll", "scan"])
def test_joined_blocks_equal_plain_ones(seed, blocks):
    """Compare with plain blocks. The program is traced for an H100 and run on this CPU.

    XLA takes the kernels' place, derivative rules included.

    With drop path, which drops half of the second block's outputs.
    """
    options = SMALL | COMPUTE | {"blocks": blocks, "depth": 2 if blocks == "unroll" else 4}
    graphdef, params = split(seed, **options, drop_path=0.5)
    images = jax.random.normal(jax.random.key(seed), (88, 48, 48, 3))

    def run(params, images):
        call = lambda p: nnx.merge(graphdef, p)(images, key=jax.random.key(seed))  # noqa: E731
        out, pull = jax.vjp(call, params)
        return out, pull(jnp.cos(out))[0]

    with abstract_h100():
        traced = jax.jit(run).trace(params, images)
    got = traced.lower().compile()(params, images)
    wanted = jax.jit(lambda p, x: run(p, x))(params, images)
    assert max(relative_errors(got, wanted)) < 2e-2


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize(
    "options", [{"blocks": "unroll"}, {"blocks": "scan"}, {"remat": "block"}], ids=str
)
def test_gradients_around_known_scans_equal_plain_ones(seed, options):
    """Compare gradients whose projections run in two kernels with plain ones; see the test before this one."""
    sizes = {"depth": 2, "embed_dim": 192, "image_size": 32, "patch_size": 4, "num_classes": 7}
    graphdef, params = split(seed, **sizes, **COMPUTE, **options)
    images = jax.random.normal(jax.random.key(seed), (8, 32, 32, 3))

    def run(params, images):
        out, pull = jax.vjp(lambda p: nnx.merge(graphdef, p)(images), params)
        return out, pull(jnp.cos(out))[0]

    with abstract_h100():
        traced = jax.jit(run).trace(params, images)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("projection_gradients", "projection_weight_gradients"):
        assert launches(text, kernel) == 2  # A loop goes over pairs of blocks.
    got = traced.lower().compile()(params, images)
    wanted = jax.jit(lambda p, x: run(p, x))(params, images)
    assert max(relative_errors(got, wanted)) < 2e-2


@pytest.mark.drawn("models on kernels", one_in=20)
def test_float32_and_other_batches_keep_xlas_gradients_of_projections():
    """Train in TF32, where operands are not rounded to bfloat16, and with tokens that do not cut into tiles."""
    for b, options in ((64, {"matmul_precision": "tf32"}), (9, COMPUTE)):
        graphdef, params = split(depth=1, **options)
        images = jax.ShapeDtypeStruct((b, 224, 224, 3), jnp.float32)
        loss = lambda p, x, g=graphdef: nnx.merge(g, p)(x).sum()  # noqa: E731
        text = lower_for_h100(jax.grad(loss), params, images)
        assert launches(text, "projected_scan") == 1
        assert launches(text, "selective_scan_gradients") == 1
        assert "projection_gradients" not in text


@pytest.mark.drawn("models on kernels", one_in=20)
def test_a_loop_over_joined_blocks_keeps_the_residual_stream_alone():
    """Of two blocks: the stream before, between and behind them, and no normalised tokens."""
    options = SMALL | COMPUTE | {"depth": 4, "blocks": "scan", "residual_in_fp32": False}
    graphdef, params = split(**options)
    images = jax.ShapeDtypeStruct((88, 48, 48, 3), jnp.float32)

    def loss(params, images):
        return nnx.merge(graphdef, params)(images).sum()

    with abstract_h100():
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params, images).jaxpr
    stacks = [
        variable.aval.shape
        for equation in jaxpr.eqns
        if equation.primitive.name == "scan" and not equation.params["reverse"]
        for variable in equation.outvars
    ]
    assert stacks.count((2, 88, 144, 64)) == 3, stacks


def rounds_pooled_tokens(text):
    """Tell whether a kernel before the scans writes bfloat16."""
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    fronts = [line for line in calls if re.search(r"mixer_(project_)?front", line)]
    assert fronts
    return any("tensor<2x88x12x128xbf16>" in line for line in fronts)


@pytest.mark.parametrize(
    ("options", "rounded"),
    [
        (COMPUTE, True),
        (COMPUTE | {"unpool": "after_skip"}, False),
        (COMPUTE | {"pooling": "max"}, False),
        ({"dtype": "bfloat16"}, False),
        ({}, False),
    ],
    ids=["compute", "after_skip", "max", "wide", "float32"],
)
def test_pooled_tokens_are_rounded_where_one_kernel_reads_them(options, rounded):
    """Round means in bfloat16 that `projected_scan` reads and nothing is differentiated by."""
    graphdef, params = split(**SMALL | options, blocks="unroll")
    images = jax.ShapeDtypeStruct((88, 48, 48, 3), jnp.float32)
    forward = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
    assert rounds_pooled_tokens(lower_for_h100(forward, params, images)) == rounded
    if options == COMPUTE:
        text = lower_for_h100(jax.grad(lambda *args: jnp.sum(forward(*args))), params, images)
        assert not rounds_pooled_tokens(text) and launches(text, "projected_scan") == 2


def test_long_scans_read_wide_pooled_tokens():
    """Of 80 steps there is no kernel for projections and scan: the separate ones read what they read before."""
    graphdef, params = split(**SMALL | COMPUTE | {"image_size": 320, "depth": 1}, blocks="unroll")
    images = jax.ShapeDtypeStruct((2, 320, 320, 3), jnp.float32)
    text = lower_for_h100(lambda p, x: nnx.merge(graphdef, p)(x), params, images)
    assert launches(text, "mixer_back_project") == 1 and launches(text, "projected_scan") == 0
    assert "tensor<2x2x80x128xf32>" in text


def test_logits_of_rounded_pooled_tokens(seed):
    """Compare the fast mode at inference with the float32 model, which shares its weights.

    The program is traced for an H100 and run on this CPU.
    """
    fast = SMALL | COMPUTE | {"depth": 4, "residual_in_fp32": False}
    graphdef, params = split(seed, **fast, blocks="unroll")
    exact, _ = split(seed, **SMALL | {"depth": 4}, blocks="unroll")
    images = jax.random.normal(jax.random.key(seed), (88, 48, 48, 3))
    with abstract_h100():
        traced = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x)).trace(params, images)
    assert "bf16[2,88,12,128]" in str(traced.jaxpr)
    got = jax.device_get(traced.lower().compile()(params, images))
    wanted = jax.device_get(jax.jit(lambda p, x: nnx.merge(exact, p)(x))(params, images))
    assert 0 < relative_error(got, wanted) < 3e-2


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("options", "call", "joined"),
    [
        (COMPUTE, {}, True),
        (COMPUTE | {"pooling": "max", "blocks": "unroll"}, {}, True),
        (COMPUTE | {"drop_path": 0.1}, {"key": 0}, True),
        (COMPUTE | {"remat": "block"}, {}, False),
        (COMPUTE | {"out_indices": (0,)}, {}, False),
        (COMPUTE | {"norm": "layer"}, {}, False),
        (COMPUTE | {"proj_bias": True}, {}, False),
        (COMPUTE | {"class_token": "middle"}, {}, False),
        ({"dtype": "bfloat16"}, {}, False),
        ({}, {}, False),
    ],
)
def test_which_calls_join_their_blocks(monkeypatch, options, call, joined):
    from fastvim_jax.models import vision_mamba

    built = []

    class Watched(vision_mamba.JoinedBlock):
        def __init__(self, blocks, tokens, **options):
            built.append(blocks)
            super().__init__(blocks, tokens, **options)

    monkeypatch.setattr(vision_mamba, "JoinedBlock", Watched)
    graphdef, params = split(**SMALL, **options)
    images = jax.ShapeDtypeStruct((88, 48, 48, 3), jnp.float32)

    def run(params, images):
        key = jax.random.key(call["key"]) if call else None
        return nnx.merge(graphdef, params)(images, key=key)

    with abstract_h100():
        jax.eval_shape(run, params, images)
        assert bool(built) == joined
        monkeypatch.setenv("FASTVIM_KERNELS", "off")
        built.clear()
        jax.eval_shape(lambda *a: run(*a), params, images)
    assert not built

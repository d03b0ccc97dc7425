"""Which attention runs where: cuDNN's or XLA's, chosen where the program is lowered."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as library

from fastvim_jax.layers import attention
from fastvim_jax.layers.pooling import NoPooling
from fastvim_jax.precision import Precision
from pallas_kernels import gpu
from tests.pallas_kernels.mosaic_support import abstract_h100, needs_mosaic, relative_errors
from tests.support import x64

HALF = Precision("bfloat16")


@pytest.fixture
def hopper(monkeypatch):
    """Trace as on a machine with a Hopper GPU and cuDNN, which need not be there."""
    monkeypatch.setattr(gpu, "_capabilities", lambda: (9.0,))
    with_cudnn(monkeypatch)


def with_cudnn(monkeypatch):
    monkeypatch.setattr(
        library, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91200), raising=False
    )
    # A cache of its own, so that no later test of the process finds answers for this stand-in.
    monkeypatch.setattr(attention, "_refusal", functools.cache(attention._refusal.__wrapped__))


def attend(q, k, v):
    return attention.attend(q, k, v, HALF)


def gradients(q, k, v, out_bar):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(out_bar)


def tokens_of(shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@pytest.mark.parametrize(
    ("capabilities", "width", "cudnn"),
    [
        ((9.0,), 64, True),
        ((8.0,), 128, True),
        ((9.0,), 20, False),
        ((7.5,), 64, False),
        ((0.0,), 64, False),  # another maker's GPU
        ((), 64, False),
    ],
)
def test_cudnn_where_it_takes_the_heads(monkeypatch, capabilities, width, cudnn):
    with_cudnn(monkeypatch)
    monkeypatch.setattr(gpu, "_capabilities", lambda: capabilities)
    assert (attention._cudnn_refusal(width) is None) == cudnn
    q = tokens_of((1, 2, 1, width))
    run = jax.jit(lambda *qkv: attend(*qkv))  # of its own, since traces are kept
    lowered = run.trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    assert ("cudnn" in lowered) == cudnn


def test_what_cudnn_refuses_is_said_once(monkeypatch, caplog, hopper):
    gpu.log_once.cache_clear()
    for _ in range(2):
        assert attention._cudnn_refusal(20) is not None
    assert len(caplog.records) == 1
    assert "attention: using XLA and not cuDNN, since The head dim must be" in caplog.text


@pytest.mark.parametrize("tokens", [6, 7])
def test_the_platform_is_known_when_a_program_is_lowered(hopper, tokens):
    """Lower one traced program twice: for CUDA it holds cuDNN's kernels, for the CPU XLA's operations."""
    q = tokens_of((2, tokens, 3, 16))
    for run, arrays, calls in ((attend, (q, q, q), 1), (gradients, (q, q, q, q), 2)):
        traced = jax.jit(run).trace(*arrays)
        on_cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert on_cuda.count("custom_call @__cudnn$fmhaSoftmax") == calls
        assert "stablehlo.exponential" not in on_cuda
        on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
        assert "cudnn" not in on_cpu
        assert "stablehlo.exponential" in on_cpu


def test_only_gradients_add_a_token(hopper):
    """cuDNN wants an even number of tokens for its gradient alone; inference copies no q, k and v."""
    q = tokens_of((2, 7, 3, 16))
    for run, arrays, padded in ((attend, (q, q, q), False), (gradients, (q, q, q, q), True)):
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert ("stablehlo.pad" in text) == padded


def test_products_of_query_key_and_value(rng):
    """With activations="compute" each has a product of its own, of the same columns of the layer."""
    h = jnp.asarray(rng.standard_normal((2, 7, 24)), jnp.float32)
    outputs = {}
    for activations in ("wide", "compute"):
        precision = Precision(activations=activations)
        options = {"qkv_bias": True, "conv_width": 0, "precision": precision}
        layer = attention.Attention(24, 3, rngs=nnx.Rngs(0), **options)
        outputs[activations] = layer(h, NoPooling(7))
        run = lambda h: layer(h, NoPooling(7))  # noqa: B023, E731
        products = str(jax.make_jaxpr(run)(h)).count("f32[24,24]")
        assert (products >= 3) == (activations == "compute")
    np.testing.assert_allclose(*outputs.values(), rtol=1e-5, atol=1e-6)


def test_gelu_is_exact_in_float32():
    x = jnp.linspace(-8, 8, 4001, dtype=jnp.float32)
    with x64():
        wide = jnp.asarray(np.asarray(x, np.float64))
        exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
        wanted = jax.device_get((exact(wide), jax.vmap(jax.grad(exact))(wide)))
    gelu = lambda x: attention._gelu(x[None] - 1, jnp.ones(1))[0]  # noqa: E731
    got = jax.device_get((jax.vmap(gelu)(x), jax.vmap(jax.grad(gelu))(x)))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_export_for_either_platform(hopper):
    q = tokens_of((2, 6, 3, 16))
    allowed = [
        export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{way}")
        for way in ("", "Backward")
    ]
    for platform, cudnn in (("cpu", False), ("cuda", True)):
        exported = export.export(jax.jit(gradients), platforms=[platform], disabled_checks=allowed)(
            q, q, q, q
        )
        assert ("cudnn" in exported.mlir_module()) == cudnn


def test_a_portable_program_holds_no_kernel(hopper):
    """Leave cuDNN out of a portable program, because JAX cannot lower its call for two platforms at once."""
    q = tokens_of((2, 6, 3, 16))
    with gpu.kernels_off():
        both = export.export(jax.jit(lambda *a: attend(*a)), platforms=["cpu", "cuda"])(q, q, q)
    assert "cudnn" not in both.mlir_module()


def test_a_batch_of_any_size_is_left_to_xla(hopper):
    q = tokens_of((*export.symbolic_shape("b"), 6, 3, 16))
    program = export.export(jax.jit(lambda *a: attend(*a)), platforms=["cuda"])(q, q, q)
    assert "cudnn" not in program.mlir_module()


@needs_mosaic
def test_an_abstract_gpu_counts(monkeypatch):
    """Accept an abstract GPU. Without a GPU the platform's name says too little: which GPU it is decides."""
    with_cudnn(monkeypatch)
    assert attention._cudnn_refusal(64) == gpu.NO_GPU
    with abstract_h100():
        assert attention._cudnn_refusal(64) is None


@pytest.mark.drawn
@pytest.mark.parametrize("tokens", [6, 7])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_values_and_gradients_beside_a_gpu(monkeypatch, hopper, rng, platform, tokens):
    """Compare both branches with float64; an operation of XLA's stands in for cuDNN's."""
    if platform == "cuda":
        in_xla = lambda tokens, *qkv: attention._attend_in_xla("default", tokens, *qkv)  # noqa: E731
        monkeypatch.setattr(attention, "_attend_on_gpu", in_xla)
        on_cuda = lambda *arrays, cuda, default: cuda(*arrays)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", on_cuda)
    arrays = [jnp.asarray(rng.standard_normal((2, tokens, 3, 16)), jnp.bfloat16) for _ in range(4)]
    got = jax.jit(lambda *a: gradients(*a))(*arrays)
    with x64():
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        run = lambda *qkv: attention.attend(*qkv, Precision("float64", "float64"))  # noqa: E731
        out, pull = jax.vjp(run, *wide[:3])
        wanted = (out, *pull(wide[3]))
    assert max(relative_errors(got, wanted)) < 2e-2

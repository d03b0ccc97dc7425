"""Residual sum and norm, and the ViTs that end their branches so, on a Hopper GPU; skipped where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.models import create_model
from pallas_kernels import gpu
from tests.models.test_joined_vit import randomised, value_and_gradients, worst
from tests.pallas_kernels import test_add_norm as cases
from tests.pallas_kernels.mosaic_support import relative_errors

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
    reason="no GPU that the kernels run on",
)

SHAPES = [
    (128, 197, 192),  # ViT-T
    (128, 198, 384),  # ViT-S with a token for padding
    (128, 197, 768),
    (7, 197, 1024),
    (3, 50, 1280),
    (1, 197, 192),  # 197 tokens are no multiple of four
    (1, 5, 64),
]


def poison(shape):
    """Leave NaN where results will be."""
    arrays = [jnp.full(shape, jnp.nan, dtype) for dtype in ("float32", "bfloat16") * 6]
    jax.block_until_ready(arrays)


def wanted_of(args):
    """Compute `value_and_gradients` on the CPU in float32."""
    with jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)), args)
        out, pull = jax.vjp(lambda *five: cases.plain(*five, wide[5]), *wide[:5])
        # The cosines of what add_norm returns, in the dtypes in which it returns them.
        dtypes = args[1].dtype, args[0].dtype
        rounded = [x.astype(d).astype("float32") for x, d in zip(out, dtypes, strict=True)]
        bars = [
            jnp.cos(x).astype(d).astype("float32") for x, d in zip(rounded, dtypes, strict=True)
        ]
        return jax.device_get((out, pull(tuple(bars))))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", cases.KINDS, ids=str)
def test_kernels(seed, shape, options):
    args = cases.draw(np.random.default_rng(seed), shape, **options)
    compiled = jax.jit(cases.value_and_gradients).lower(*args).compile()
    text = compiled.as_text()
    assert "mixer_sum_norm" in text and ("mixer_norm_gradient" in text) == (shape[-1] <= 768)
    poison(shape)
    first = jax.device_get(compiled(*args))
    errors = relative_errors(first, wanted_of(args))
    print(errors)
    assert max(errors) < cases.BOUND
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(*args)))


def test_under_vmap(seed):
    rng = np.random.default_rng(seed)
    drawn = [cases.draw(rng, (3, 7, 192), layer=True, biased=True) for _ in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
    compiled = jax.jit(jax.vmap(cases.value_and_gradients)).lower(*stacked).compile()
    assert "mixer_norm_gradient" in compiled.as_text()
    poison((2, 3, 7, 192))
    got = jax.device_get(compiled(*stacked))
    wanted = jax.tree.map(lambda *x: np.stack(x), *map(wanted_of, drawn))
    assert max(relative_errors(got, wanted)) < cases.BOUND


@pytest.mark.parametrize("blocks", ["unroll", "scan"])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_vit_and_its_gradient(rng, size, blocks):
    """Compare the fast mode and the same without kernels with float32; 197 tokens are padded for the gradient."""
    build = lambda **options: create_model(  # noqa: E731
        f"vit_{size}_patch16_224",
        rngs=nnx.Rngs(0),
        depth=3,
        drop_path=0.2,
        num_classes=10,
        **options,
    )
    graphdef, params = randomised(build(fast=True, blocks=blocks), rng)
    exact = nnx.graphdef(build(blocks=blocks))
    images = jnp.asarray(rng.standard_normal((6, 224, 224, 3)), jnp.float32)
    keep = jnp.asarray(rng.choice([0.0, 1.0], (3, 2, 6)), jnp.float32)
    compiled = value_and_gradients(graphdef, keep).lower(params, images).compile()
    text = compiled.as_text()
    for kernel in ("mixer_sum_norm", "mixer_norm_gradient", "cudnn", "[6,198,"):
        assert kernel in text
    poison((6, 198, 768))
    got = compiled(params, images)
    with gpu.kernels_off():
        wanted = value_and_gradients(exact, keep)(params, images)
        without = value_and_gradients(graphdef, keep)(params, images)
    errors = worst(got, wanted), worst(without, wanted)
    print(errors)
    assert errors[0] < 1.5 * errors[1]  # both about 5e-2 with these parameters
    jax.tree.map(
        np.testing.assert_array_equal, *jax.device_get((got[0], compiled(params, images)[0]))
    )

"""Test that programs with `jax_enable_x64` switched on can use the kernels."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax import create_model
from tests.pallas_kernels import test_mosaic_block as block
from tests.pallas_kernels.mosaic_support import launches, lower_for_h100, needs_mosaic
from tests.support import x64

pytestmark = needs_mosaic


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize(
    "name, kernels",
    [
        ("fastvim_tiny_patch16_224", ("mixer_project_front", "mixer_back_gradients")),
        ("vim_tiny_patch16_224", ("selective_scan", "selective_scan_gradients")),
    ],
)
def test_gradients_of_models_lower(name, kernels):
    def gradient(params, images):
        return jax.grad(lambda params: nnx.merge(graphdef, params)(images).sum())(params)

    with x64():
        model = nnx.eval_shape(lambda: create_model(name, depth=2, fast=True, rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(model)
        images = jax.ShapeDtypeStruct((128, 224, 224, 3), jnp.float32)
        text = lower_for_h100(gradient, params, images)
    for kernel in kernels:
        assert launches(text, kernel)


@pytest.mark.drawn("models on kernels", one_in=20)
def test_gradients_lower_under_vmap():
    """Lower gradients under vmap, because Mosaic's rule traces the bodies of kernels again."""
    case = {**block.FULL, "e": 128}

    def gradient(args):
        return jax.grad(lambda args: jnp.sum(block.block(args, "auto", **case)[0]))(args)

    with x64():
        args = block.abstract(case)
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), args)
        text = lower_for_h100(jax.vmap(gradient), args)
    for kernel in ("front", "back_project", "norm_gradient", "back_gradients", "front_gradients"):
        assert launches(text, f"mixer_{kernel}") == 1

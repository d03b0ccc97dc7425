"""Gradients of whole models inside a caller's `jax.shard_map`, traced for a mesh that is not there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from fastvim_jax import create_model
from fastvim_jax.models import build_model, cascade_mask_rcnn, model_config, stack, upernet
from fastvim_jax.models.stack import _own_gradient, _unstack
from pallas_kernels.sharding import sums_as_computed
from tests.layers.test_attention import with_cudnn
from tests.pallas_kernels.mosaic_support import abstract_device, needs_mosaic

JOINED = "joined"
JOINED_VIT = "vit, joined"
ODD_VIT = "vit, odd tokens"
ON_A_GPU = (JOINED, JOINED_VIT, ODD_VIT)
SMALL = {"embed_dim": 16, "depth": 2, "image_size": 16, "patch_size": 4, "dtype": "bfloat16"}


def logits(model, images):
    return [model(images)]


def reconstruction(model, images):
    return [model(images, noise=images[:, ::4, ::4, 0].reshape(len(images), -1)).predicted]


def segmentation(model, images):
    return [model(images).main]


def detection(model, images):
    levels = model.features(images)
    scores, deltas = model.rpn(levels)
    stage = model.stages[0]
    boxes, masks = levels[0][:, :7, :7], levels[0][:, :14, :14]
    return [*scores, *deltas, *stage.box_head(boxes), stage.mask_head(masks)]


def segmenter():
    backbone = model_config("fastvim_tiny_patch16_224", **SMALL | {"depth": 4})
    config = upernet(backbone, image_size=16, num_classes=3, channels=8, pool_scales=(1, 2))
    return build_model(config, rngs=nnx.Rngs(0))


def detector():
    backbone = model_config("fastvim_tiny_patch16_224", **SMALL | {"patch_size": 16})
    config = cascade_mask_rcnn(backbone, num_classes=2, width=8, hidden=8)
    return build_model(config, rngs=nnx.Rngs(0))


def named(name, **options):
    return lambda: create_model(name, rngs=nnx.Rngs(0), **(SMALL | options))


CASES = {
    "fastvim": (
        named("fastvim_tiny_patch16_224", proj_bias=True, layer_scale=0.1, pooling="attention"),
        logits,
    ),
    "fastvim-compute": (named("fastvim_tiny_patch16_224", activations="compute"), logits),
    # As kernels for an H100 that need not be there: each block joined to the next block's norm.
    JOINED: (
        named("fastvim_tiny_patch16_224", activations="compute", embed_dim=64),
        logits,
    ),
    "fastvim-reference": (
        named("fastvim_tiny_patch16_224", scan_implementation="reference"),
        logits,
    ),
    "vit": (named("vit_tiny_patch16_224", num_heads=4), logits),
    "vit-float32": (named("vit_tiny_patch16_224", num_heads=4, dtype="float32"), logits),
    JOINED_VIT: (named("vit_tiny_patch16_224", num_heads=4, fast=True, embed_dim=64), logits),
    # cuDNN's attention with a masked token more.
    ODD_VIT: (
        named(
            "vit_tiny_patch16_224", num_heads=1, activations="compute", embed_dim=64, image_size=20
        ),
        logits,
    ),
    "channels": (named("fastchannelvim_tiny_patch8_224", channels=3), logits),
    "masked": (
        named("mae_fastvim_tiny_patch16_224", decoder_dim=8, decoder_depth=1),
        reconstruction,
    ),
    "segmentation": (segmenter, segmentation),
    "detection": (detector, detection),
}


@pytest.mark.drawn("processes and devices", one_in=6)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=needs_mosaic if case in ON_A_GPU else ()) for case in CASES],
)
def test_no_parameters_gradient_is_summed_over_devices_in_half_precision(case, monkeypatch):
    device = abstract_device() if case in ON_A_GPU else None
    if case == JOINED:  # of a batch that would not fill the GPU
        from pallas_kernels.mixer_core import mosaic

        monkeypatch.setattr(mosaic, "block_unsupported", lambda *arrays, by_name: None)
    if case == ODD_VIT:
        with_cudnn(monkeypatch)
    make, apply = CASES[case]
    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def loss(params, rest, images):
        model = nnx.merge(graphdef, params, rest)
        return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in apply(model, images))

    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    specs = (P(), P(), P("data"))
    gradient = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=P())
    size = 64 if case == "detection" else 16
    images = jax.ShapeDtypeStruct((4, size, size, 3), jnp.float32)
    sums = list(summed(jax.make_jaxpr(gradient)(params, rest, images).jaxpr))
    assert len(sums) >= len(jax.tree.leaves(params)) // 2
    assert {x.dtype for x in sums} == {jnp.dtype("float32")}


def summed(jaxpr):
    """Yield the types of all arrays that a program sums over devices."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("psum"):
            yield from (x.aval for x in equation.invars)
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(part):
                yield from summed(getattr(part, "jaxpr", part))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@needs_mosaic
def test_joined_blocks_sum_their_gradients_together(monkeypatch):
    """Sum as many arrays over devices with four blocks as with two, and the weights of products in bfloat16.

    The gradients of these weights are the large ones that each block writes alone.
    """
    from pallas_kernels.mixer_core import mosaic

    monkeypatch.setattr(mosaic, "block_unsupported", lambda *arrays, by_name: None)
    written_alone = set()
    monkeypatch.setattr(stack, "_LARGE", 64 * 128)
    monkeypatch.setattr(stack, "_own_gradient", lambda x: written_alone.add(x.shape) or x)
    # Not a block's constant gain, which nobody reads.
    two, four = (
        [x for x in sums_of("fastvim_tiny_patch16_224", depth) if x.ndim > 1] for depth in (2, 4)
    )
    assert len(four) == len(two)
    narrow = {x.shape for x in four if x.dtype == jnp.bfloat16}
    assert {(4, 256, 64), (4, 64, 128)} <= narrow
    assert {(256, 64), (64, 128)} <= written_alone


@needs_mosaic
def test_joined_vit_blocks_sum_the_gradients_of_vectors_together():
    two, four = (sums_of("vit_tiny_patch16_224", depth, num_heads=4) for depth in (2, 4))
    wide = [[x for x in sums if x.dtype == jnp.float32] for sums in (two, four)]
    assert len(wide[0]) == len(wide[1]) < len(two)


def sums_of(name, depth, **options):
    """Return the types of all arrays that a gradient inside a shard_map sums over devices, as computed."""
    make = named(name, activations="compute", embed_dim=64, depth=depth, blocks="unroll", **options)
    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def loss(params, rest, images):
        return jnp.sum(nnx.merge(graphdef, params, rest)(images).astype(jnp.float32))

    def gradient(*arguments):
        with sums_as_computed():
            return jax.grad(loss)(*arguments)

    mesh = AbstractMesh(
        (4,), ("data",), axis_types=(AxisType.Auto,), abstract_device=abstract_device()
    )
    run = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    images = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
    return list(summed(jax.make_jaxpr(run)(params, rest, images).jaxpr))


def test_large_gradients_are_written_before_they_are_joined_on_several_devices():
    """Count the barriers: one for each block's large array, none where nothing varies over devices."""

    def loss(stacked):
        return sum(jnp.sum(jnp.sin(leaf)) for block in _unstack(stacked) for leaf in block)

    def varying(stacked):
        return jax.grad(loss)(jax.lax.pcast(stacked, ("data",), to="varying"))

    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    stacked = jnp.ones((3, 512, 256)), jnp.ones((3, 4, 4))
    share = jax.shard_map(varying, mesh=mesh, in_specs=P(), out_specs=P("data"))
    assert str(jax.make_jaxpr(share)(stacked)).count("optimization_barrier") == 3
    assert "optimization_barrier" not in str(jax.make_jaxpr(jax.grad(loss))(stacked))
    large, small = jax.grad(lambda x: loss(jax.tree.map(_own_gradient, x)))(stacked)
    assert (large == jnp.cos(1.0)).all() and (small == jnp.cos(1.0)).all()

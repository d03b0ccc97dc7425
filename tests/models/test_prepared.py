"""Weights prepared once: what a call still computes, and its values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.models import create_model
from fastvim_jax.models.prepared import split_weights
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    launches,
    lower_for_h100,
    needs_mosaic,
)

SIZES = {"depth": 3, "embed_dim": 24, "image_size": 32, "num_classes": 4}


def shapes(arrays):
    return [tuple(each.shape) for each in arrays]


def test_a_function_is_cut_between_its_weights_and_its_inputs():
    def function(weights, x):
        _ = weights["unread"] * 2.0
        kernel = jnp.exp(weights["kernel"]).T
        first, second = (part + 0 for part in jnp.split(weights["bias"], 2))
        return {"y": x @ kernel + jnp.broadcast_to(first, (8, 3)), "second": second, "x": x}

    weights = {"bias": jnp.arange(6.0), "kernel": jnp.ones((3, 5)), "unread": jnp.ones(7)}
    x = jax.random.normal(jax.random.key(0), (8, 5))
    split = split_weights(function, weights, x)
    prepared = split.prepare(weights)
    assert sorted(shapes(prepared)) == [(3,), (3,), (5, 3)]
    wanted = function(weights, x)
    jax.tree.map(np.testing.assert_array_equal, split.run(prepared, x), wanted)
    # `run` reads the prepared arrays, not the weights that the function was split with.
    other = {**weights, "bias": -weights["bias"], "kernel": weights["kernel"] / 2}
    found = split.run(split.prepare(other), x)
    jax.tree.map(np.testing.assert_array_equal, found, function(other, x))
    assert (found["y"] != wanted["y"]).all()
    assert "exp" not in str(jax.make_jaxpr(split.run)(prepared, x))


def test_slices_of_stacked_weights_stay_in_the_call():
    """Pass a stacked array as one argument, because every argument of a call costs the host time."""
    function = lambda w, x: sum(x @ part for part in jnp.unstack(-w))  # noqa: E731
    w, x = jnp.ones((6, 4, 4)), jnp.ones((2, 4))
    split = split_weights(function, w, x)
    prepared = split.prepare(w)
    assert shapes(prepared) == [(6, 4, 4)]
    np.testing.assert_array_equal(split.run(prepared, x), function(w, x))


def test_large_calls_get_matrices_one_by_one():
    """Products of cuBLAS cannot read a slice: XLA would copy it in every call. Decays stay stacked for the kernels."""
    shape = jax.ShapeDtypeStruct
    weights = {"kernel": shape((3, 256, 128), "float32"), "decay": shape((3, 2**12, 16), "float32")}

    def function(weights, x):
        parts = zip(
            jnp.unstack(weights["kernel"].mT)[:2], jnp.unstack(-weights["decay"]), strict=False
        )
        return [(x + decay[0, 0]) @ kernel for kernel, decay in parts]

    counts = {}
    for rows in (2**14, 2**15):
        x = shape((rows, 128), "float32")
        split = split_weights(function, weights, x)
        counts[rows] = sorted(shapes(jax.eval_shape(split.prepare, weights)))
    decay, kernel = (3, 2**12, 16), (128, 256)
    assert counts == {2**14: [(3, *kernel), decay], 2**15: [decay, kernel, kernel]}


def test_constants_and_the_platform_are_no_weights():
    twos = np.full(4, 2.0, np.float32)

    def function(w, x):
        table = jnp.arange(4.0) * jnp.asarray(twos)
        chosen = jax.lax.platform_dependent(x, default=lambda x: x, cuda=lambda x: -x)
        return chosen * w + table

    w = jnp.float32(3)
    split = split_weights(function, w, jnp.ones(4))
    assert split.prepare(w) == [w]
    np.testing.assert_array_equal(jax.jit(split.run)([w], jnp.ones(4)), 3 + 2 * jnp.arange(4.0))


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastvim_tiny_patch16_224", {}),
        ("fastvim_tiny_patch16_224", {"fast": True}),
        ("vim_tiny_patch16_224", {"blocks": "unroll"}),
        ("vit_tiny_patch16_224", {"dtype": "bfloat16"}),
    ],
)
def test_models_keep_their_values(seed, name, options):
    model = create_model(name, rngs=nnx.Rngs(seed), **SIZES, **options)
    graphdef, params = nnx.split(model)
    images = jax.random.normal(jax.random.key(seed), (2, 32, 32, 3))
    forward = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
    split = split_weights(forward, params, images)
    prepared = jax.jit(split.prepare)(params)
    wanted = jax.jit(forward)(params, images)
    # Not bits: XLA may leave a rounding out where it sees it undone.
    tolerance = 1e-5 if options.get("dtype", "") == "" and not options.get("fast") else 2e-2
    error = jnp.abs(jax.jit(split.run)(prepared, images) - wanted).max()
    assert error <= tolerance * jnp.abs(wanted).max()


@needs_mosaic
def test_a_call_of_the_fast_mode_prepares_no_weights():
    """On a GPU a call only takes blocks' parts out of stacked arrays, and no argument belongs to a single block."""
    counts = []
    for depth in (2, 3):
        options = {"depth": depth, "fast": True}
        model = create_model("fastvim_tiny_patch16_224", rngs=nnx.Rngs(0), **options)
        graphdef, params = nnx.split(model)
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.bfloat16)
        forward = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: B023, E731
        with abstract_h100():
            split = split_weights(forward, params, images)
            prepared = jax.eval_shape(split.prepare, params)
            whole = operations(forward, params, images)
            call = operations(split.run, prepared, images)
        counts.append(len(prepared))
        preparing = {"exp", "neg", "concatenate", "reduce_precision", "stop_gradient"}
        assert preparing < whole
        assert preparing.isdisjoint(call)
    assert counts[0] == counts[1] < 30
    text = lower_for_h100(split.run, prepared, images)
    for kernel in ("mixer_front", "projected_scan", "mixer_back_project"):
        assert launches(text, kernel) == depth


def operations(function, *arguments) -> set[str]:
    """Return the names of a function's operations; those inside of others, such as kernels, are left out."""
    return {eqn.primitive.name for eqn in jax.make_jaxpr(function)(*arguments).jaxpr.eqns}

"""Stacked leaves and the unstacked parameters they stand for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import UserError
from fastvim_jax.models import VisionMambaConfig, build_model, create_model
from fastvim_jax.models.parameters import (
    map_parameters,
    named_parameters,
    parameter_infos,
    replace_parameters,
    round_products,
)

CONFIG = VisionMambaConfig(image_size=8, patch_size=4, embed_dim=8, depth=3, num_classes=2)


@pytest.fixture
def params(key):
    return nnx.state(build_model(CONFIG, rngs=nnx.Rngs(key)))


def test_names_and_values_round_trip(params, rng):
    flat = named_parameters(params)
    assert flat["blocks.2.mixer.forward.D"].shape == (16,)
    assert flat["pos_embed"].shape == (1, 4, 8)
    assert not any(name.startswith("blocks.mixer") for name in flat)
    fresh = {
        name: jnp.asarray(rng.normal(size=value.shape), jnp.float32) for name, value in flat.items()
    }
    again = named_parameters(replace_parameters(params, fresh))
    for name, value in fresh.items():
        np.testing.assert_array_equal(again[name], value)


def test_blocks_start_from_different_values(params):
    flat = named_parameters(params)
    assert not np.allclose(
        flat["blocks.0.mixer.in_proj.kernel"], flat["blocks.1.mixer.in_proj.kernel"]
    )


def test_rules_see_the_unstacked_rank_in_both_modes(params):
    ranks = map_parameters(lambda info, leaf: info.ndim, params)
    by_name = {info.name: info for info in parameter_infos(params)}
    assert (
        by_name["blocks.mixer.forward.D"].ndim == 1 and by_name["blocks.mixer.forward.D"].depth == 3
    )
    assert by_name["blocks.mixer.in_proj.kernel"].ndim == 2
    assert by_name["pos_embed"].ndim == 3 and not by_name["pos_embed"].stacked
    unrolled = nnx.state(
        build_model(dataclasses.replace(CONFIG, blocks="unroll"), rngs=nnx.Rngs(0))
    )
    other = map_parameters(lambda info, leaf: info.ndim, unrolled)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, ranks, other))


def test_one_error_lists_everything_that_does_not_fit(params):
    flat = dict(named_parameters(params))
    del flat["blocks.1.norm.scale"]
    flat["surplus"] = jnp.zeros(3)
    flat["head.bias"] = jnp.zeros(5)
    with pytest.raises(UserError) as caught:
        replace_parameters(params, flat)
    for part in (
        "missing: blocks.1.norm.scale (8,)",
        "unexpected: surplus (3,)",
        "head.bias: expected (2,), given (5,)",
    ):
        assert part in str(caught.value)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize("name", ["fastvim_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_weights_rounded_once_give_the_same_model(seed, name):
    sizes = {"depth": 2, "embed_dim": 48, "image_size": 8, "patch_size": 4, "num_classes": 5}
    model = create_model(name, rngs=nnx.Rngs(seed), dtype="bfloat16", **sizes)
    graphdef, params = nnx.split(model)
    rounded = round_products(params, jnp.dtype(jnp.bfloat16))
    narrow = {n for n, p in named_parameters(rounded).items() if p.dtype == jnp.bfloat16}
    assert "patch_embed.proj.kernel" in narrow and len(narrow) > 2
    assert not any(n.startswith("head") or "norm" in n or "conv" in n for n in narrow), narrow
    assert not any(n.endswith((".bias", ".A_log", ".D")) for n in narrow), narrow
    images = jax.random.normal(jax.random.key(seed), (2, 8, 8, 3))
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(images))
    first, second = run(params), run(rounded)
    # Not bits: XLA may leave a rounding out where it sees it undone.
    assert float(jnp.abs(first - second).max()) < 2e-2 * float(jnp.abs(first).max())
    wide = round_products(params, jnp.dtype(jnp.float32))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), wide, params))


def test_gradients_of_blocks_written_out_are_put_together_without_sums(key):
    """Stack the gradients of all blocks into one array, and add no padded ones."""
    model = create_model(
        "fastvim_tiny_patch16_224", depth=3, embed_dim=16, image_size=32, num_classes=4,
        conv_width=0, blocks="unroll", rngs=nnx.Rngs(key),
    )  # fmt: skip
    graphdef, params = nnx.split(model)
    images = jnp.ones((1, 32, 32, 3))
    loss = lambda params: nnx.merge(graphdef, params)(images).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    stacked = str(params["blocks"]["mixer"]["in_proj"]["kernel"][...].shape).replace(" ", "")[1:-1]
    made = [line for line in text.splitlines() if f":f32[{stacked}]" in line.split("=")[0]]
    assert any(" stack[" in line for line in made)
    assert not any(" pad[" in line or "add_any" in line for line in made)

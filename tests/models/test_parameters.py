"""Stacked leaves and the unstacked parameters they stand for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import UserError
from fastvim_jax.models import VisionMambaConfig, build_model
from fastvim_jax.models.parameters import (
    map_parameters,
    named_parameters,
    parameter_infos,
    replace_parameters,
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

"""Models with a backbone inside, or with a second stack of blocks: every rule of parameters sees the unstacked ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from fastvim_jax.distributed import state_shardings
from fastvim_jax.distributed.sharding import SMALLEST, parameter_spec
from fastvim_jax.models import VisionMamba, VisionMambaConfig
from fastvim_jax.models.parameters import (
    named_parameters,
    parameter_infos,
    replace_parameters,
    round_products,
    stacked_key,
)
from fastvim_jax.models.stack import stack_blocks
from fastvim_jax.models.vision_mamba import Block
from fastvim_jax.training.optimizer import layer_decay_factor, parameter_groups
from tests.support import assert_close

DEPTH, DECODER_DEPTH = 4, 3


class Segmenter(nnx.Module):
    """A backbone of its own prefix, with a head behind it."""

    def __init__(self, config, rngs):
        self.backbone = VisionMamba(config, rngs=rngs)
        self.classifier = nnx.Linear(config.embed_dim, 2, rngs=rngs)


class Decoder(nnx.Module):
    def __init__(self, config, rngs):
        self.blocks = stack_blocks(lambda r: Block(config, rngs=r), DECODER_DEPTH, rngs)
        self.pos_embed = nnx.Param(jnp.zeros((1, 4, config.embed_dim)))


class Autoencoder(VisionMamba):
    """A backbone at the root, with a second stack below `decoder`."""

    def __init__(self, config, rngs):
        super().__init__(config, rngs=rngs)
        self.decoder = Decoder(config, rngs)


PREFIX = {Segmenter: "backbone.", Autoencoder: ""}


@pytest.fixture(scope="module", params=[Segmenter, Autoencoder], ids=lambda c: c.__name__)
def model(request):
    config = VisionMambaConfig(
        image_size=8, patch_size=4, embed_dim=8, depth=DEPTH, num_classes=2, class_token="middle"
    )
    shapes = nnx.eval_shape(lambda: request.param(config, nnx.Rngs(0)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(draw.normal(size=p.shape), p.dtype), nnx.state(shapes)
    )
    return request.param, params


def test_names_count_the_blocks_of_every_stack(model):
    kind, params = model
    flat = named_parameters(params)
    assert flat[f"{PREFIX[kind]}blocks.{DEPTH - 1}.mixer.forward.D"].shape == (16,)
    assert not any("blocks.mixer" in name or "blocks.norm" in name for name in flat)
    if kind is Autoencoder:
        assert flat[f"decoder.blocks.{DECODER_DEPTH - 1}.norm.scale"].shape == (8,)
    again = named_parameters(replace_parameters(params, flat))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), flat, again))


@pytest.mark.parametrize("groups", ["supervised", "finetune"])
def test_vectors_of_every_block_are_not_decayed(model, groups):
    kind, params = model
    flat = named_parameters(params)
    decayed = {n for n, group in parameter_groups(params, groups).items() if group.decayed}
    vectors = {n for n, p in flat.items() if p.ndim == 1}
    assert len(vectors) >= 10 * DEPTH and not vectors & decayed
    tables = {n for n in flat if n.split(".")[-1] in ("pos_embed", "class_token")}
    assert f"{PREFIX[kind]}pos_embed" in tables
    assert decayed == set(flat) - vectors - (tables if groups == "finetune" else set())


def test_layer_wise_rates_follow_the_backbone_s_depth(model):
    kind, params = model
    prefix, decay = PREFIX[kind], 0.5
    rates = {
        name: group.learning_rate_scale
        for name, group in parameter_groups(params, "supervised", layer_decay=decay).items()
    }
    for i in range(DEPTH):
        assert rates[f"{prefix}blocks.{i}.mixer.in_proj.kernel"] == layer_decay_factor(
            i + 1, DEPTH, decay
        )
    assert rates[f"{prefix}blocks.0.norm.scale"] < 1
    for name in ("patch_embed.proj.kernel", "pos_embed", "class_token"):
        assert rates[prefix + name] == layer_decay_factor(0, DEPTH, decay) < 1
    behind = [n for n in rates if n.startswith(("classifier.", "decoder.")) or ".head." in f".{n}"]
    assert len(behind) >= 2 and {rates[n] for n in behind} == {1.0}


def test_norms_are_those_of_the_unstacked(model):
    from fastvim_jax.training.parameter_norms import parameter_names, parameter_norms

    _, params = model
    norms = dict(zip(parameter_names(params), parameter_norms(params), strict=True))
    flat = named_parameters(params)
    assert set(norms) == set(flat)
    wanted = [jnp.sqrt(jnp.sum(flat[name] ** 2)) for name in norms]
    assert_close(list(norms.values()), wanted, 1e-6)


def test_parameters_and_moments_lie_as_the_unstacked_do(model):
    _, params = model
    mesh = Mesh(np.array([jax.devices()[0]] * 2).reshape(1, 2), ("data", "fsdp"))
    wide = jax.tree.map(  # of sizes that are worth splitting
        lambda p: jax.ShapeDtypeStruct(tuple(32 * s if s > 4 else s for s in p.shape), p.dtype),
        params,
    )
    tree = {"params": wide, "moments": jax.eval_shape(optax.adam(1.0).init, wide)}
    places = state_shardings(mesh, tree, stacked_key=stacked_key)
    split = 0
    for info, leaf, place in zip(
        parameter_infos(wide),
        jax.tree.leaves(wide),
        jax.tree.leaves(places["params"]),
        strict=True,
    ):
        spec = parameter_spec(info.shape, 2)
        assert tuple(place.spec) == ((None, *spec) if info.stacked and spec else tuple(spec)), (
            info.name
        )
        split += bool(spec)
        assert not spec or leaf.size >= SMALLEST
    assert split > 5
    moments = places["moments"][0].mu
    assert jax.tree.leaves(moments) == jax.tree.leaves(places["params"])


def test_products_are_rounded_wherever_the_backbone_is(model):
    kind, params = model
    rounded = named_parameters(round_products(params, jnp.dtype(jnp.bfloat16)))
    narrow = {n for n, p in rounded.items() if p.dtype == jnp.bfloat16}
    prefix = PREFIX[kind]
    assert {f"{prefix}patch_embed.proj.kernel", f"{prefix}blocks.1.mixer.in_proj.kernel"} <= narrow
    assert not any("norm" in n or "head" in n or n.startswith("classifier") for n in narrow)

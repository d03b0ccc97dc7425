"""The `Pooling` protocol: what a mixer and a stack ask of a pooling, and what they may be given."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.layers.direction import MixerConfig
from fastvim_jax.layers.mixer import Mixer
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from fastvim_jax.models.config import VisionMambaConfig
from fastvim_jax.models.stack import run_blocks, stack_blocks
from fastvim_jax.models.vision_mamba import Block
from tests.support import assert_close


@dataclass(frozen=True)
class RowsOf:
    """Mean pooling by row ids held as an array: `GridPooling` for a grid whose rows are known at run time only."""

    ids: jax.Array  # `b l`
    rows: int
    columns: int
    every_token = False

    @property
    def scan_length(self):
        return self.rows

    def to_scan_order(self, x):
        return x

    def from_scan_order(self, y):
        return y

    def pool(self, x, scores=None, *, reverse=False):
        return jnp.einsum("bls,ble->bse", jax.nn.one_hot(self.ids, self.rows), x) / self.columns

    def unpool(self, y, *, reverse=False):
        return jnp.take_along_axis(y, self.ids[..., None], axis=1)


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize(("mode", "depth"), [("scan", 4), ("unroll", 2)])
def test_a_pooling_may_hold_traced_arrays(key, mode, depth):
    """Compare a pooling of traced arrays with the fixed grid.

    It runs under jit, vmap, the loop over blocks and recomputed blocks, with gradients.
    """
    config = VisionMambaConfig(embed_dim=8, depth=depth, num_classes=0, pos_embed=False)
    graphdef, params = nnx.split(
        stack_blocks(lambda rngs: Block(config, rngs=rngs), depth, nnx.Rngs(key))
    )
    tokens = jax.random.normal(key, (3, 6, 8))
    ids = jnp.broadcast_to(jnp.repeat(jnp.arange(2), 3), (3, 6))

    def loss(params, tokens, poolings):
        out, _ = run_blocks(
            nnx.merge(graphdef, params),
            tokens,
            poolings,
            depth=depth,
            keep=None,
            mode=mode,
            remat="block",
        )
        return jnp.mean(jnp.sin(out))

    def one_image(params, tokens, ids):
        return loss(params, tokens[None], [RowsOf(ids[None], 2, 3), RowsOf(ids[None], 2, 3)])

    def each_image(params):
        return jnp.mean(jax.vmap(one_image, (None, 0, 0))(params, tokens, ids))

    got = jax.jit(jax.value_and_grad(each_image))(params)
    wanted = jax.jit(jax.value_and_grad(lambda p: loss(p, tokens, [GridPooling(2, 3)])))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 1e-5)


def test_a_pooling_is_told_the_direction(key):
    """Tell a pooling the direction: here the backward one pairs tokens with other rows than the forward one."""
    asked = []

    class Told(GridPooling):
        def pool(self, x, scores=None, *, reverse=False):
            asked.append(("pool", reverse))
            return super().pool(x[:, ::-1] if reverse else x, scores)

        def unpool(self, y, *, reverse=False):
            asked.append(("unpool", reverse))
            return super().unpool(y)

    mixer = Mixer(MixerConfig(8), rngs=nnx.Rngs(key))
    h = jax.random.normal(key, (1, 6, 8))
    told = mixer(h, Told(2, 3))
    assert asked == [("pool", False), ("unpool", False), ("pool", True), ("unpool", True)]
    assert not jnp.allclose(told, mixer(h, GridPooling(2, 3)))


def test_every_token_is_a_step_where_nothing_is_pooled(key):
    poolings: list[Pooling] = [NoPooling(6), GridPooling(2, 3, method="none"), GridPooling(2, 3)]
    assert [p.every_token for p in poolings] == [True, True, False]
    assert all(isinstance(p, Pooling) for p in [*poolings, RowsOf(jnp.zeros((1, 6), int), 2, 3)])
    mixer = Mixer(MixerConfig(8), rngs=nnx.Rngs(key))
    h = jax.random.normal(key, (1, 6, 8))
    assert_close(mixer(h, poolings[0]), mixer(h, poolings[1]), 1e-6)

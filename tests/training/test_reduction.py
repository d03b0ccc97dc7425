"""Sums of the devices' gradients in a chosen dtype, against the gradient of one device in float64."""

from __future__ import annotations

import pytest

from fastvim_jax.distributed import MeshConfig
from fastvim_jax.errors import UserError
from fastvim_jax.training import TrainConfig
from fastvim_jax.training.masked.config import PretrainConfig
from fastvim_jax.training.reduction import runs_by_device
from tests.support import assert_says_same
from tests.training.tiny import tiny_config, tiny_model

REDUCED = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from fastvim_jax.distributed import MeshConfig, make_mesh, on_mesh, place_batch
from fastvim_jax.training.classification.train import make_draw, make_loss
from fastvim_jax.training.steps import build_state, init_state, make_train_step, state_shapes
from tests.training.tiny import tiny_batch, tiny_model
from fastvim_jax.models import build_model
jax.config.update("jax_enable_x64", True)
assert len(jax.devices()) == 4
seed = int(sys.argv[1])
rng = np.random.default_rng(seed)
batch = tiny_batch(rng, 16)
config = tiny_model(depth=1, drop_path=0.3, dtype="float64", param_dtype="float64")
build = lambda: build_model(config, rngs=nnx.Rngs(seed))
graphdef, before = nnx.split(build())
optimizer = optax.sgd(1.0)

def stepped(devices, reduction, accumulate):
    mesh = make_mesh(MeshConfig(data=devices, reduction=reduction), jax.devices()[:devices])
    begin = lambda: init_state(nnx.state(build()), optimizer, ema=False)
    shapes = state_shapes(mesh, begin)
    step = make_train_step(
        make_loss(graphdef, label_smoothing=0.1), optimizer, draw=make_draw(graphdef), seed=seed,
        accumulate=accumulate, shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes), reduction=reduction,
    )
    state, placed = build_state(begin, shapes), place_batch(mesh, batch)
    lower = on_mesh(mesh, lambda s, b: step.func.lower(s, b, **step.keywords))
    lowered = lower(state, placed)
    new, metrics = lowered.compile()(state, placed, **step.keywords)
    gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, new.params)
    vector = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
    return float(metrics["loss"]), float(metrics["grad_norm"]), vector, lowered.as_text()

loss, norm, gradient, _ = stepped(1, "computed", 1)
for reduction, accumulate in (("float32", 2), ("bfloat16", 1)):
    found, found_norm, vector, text = stepped(4, reduction, accumulate)
    assert abs(found / loss - 1) < 1e-12, (found, loss)
    error = np.linalg.norm(vector - gradient) / np.linalg.norm(gradient)
    # 8 bits round by 2**-9 at most, each of 4 parts and each of 3 sums.
    low, high = (0, 1e-12) if reduction == "float32" else (1e-5, 2**-6)
    assert low <= error <= high, (reduction, error)
    assert abs(found_norm / norm - 1) <= max(high, 1e-12)
    sums = text.split("stablehlo.all_reduce")[1:]
    narrow = sum("bf16" in each.split("stablehlo.return")[0] for each in sums)
    assert (narrow > 10) == (reduction == "bfloat16"), (reduction, narrow, len(sums))
print("same")
"""


@pytest.mark.drawn("trainings", one_in=6)
def test_gradients_are_summed_in_the_chosen_dtype(seed):
    assert_says_same(REDUCED, seed, devices=4)


def test_what_cannot_be_summed_whole_is_refused():
    with pytest.raises(UserError, match=r"mesh\.fsdp=1"):
        MeshConfig(fsdp=2, reduction="bfloat16")
    assert TrainConfig.averages_images and PretrainConfig.averages_images
    with pytest.raises(UserError, match="mean over images"):
        type("Other", (TrainConfig,), {"averages_images": False})(
            model=tiny_config().model, mesh=MeshConfig(reduction="bfloat16")
        )


@pytest.mark.parametrize("fsdp", [1, 2])
def test_blocks_that_gather_one_after_the_other_are_left_to_the_partitioner(fsdp):
    mesh = MeshConfig(fsdp=fsdp)
    cases = [("unroll", "none", True), ("unroll", "block", fsdp == 1), ("scan", "none", fsdp == 1)]
    for blocks, remat, by_device in cases:
        model = tiny_model(depth=2, blocks=blocks, remat=remat)
        assert runs_by_device(model, mesh, averages_images=True) == by_device
        assert not runs_by_device(model, mesh, averages_images=False)

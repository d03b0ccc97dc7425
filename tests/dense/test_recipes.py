"""Decay groups and learning rates of the segmentation recipe, against the reference's own tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.interop import to_torch_names
from fastvim_jax.models import UperNetConfig, VisionMambaConfig, build_model
from fastvim_jax.training.optimizer import learning_rate_schedule, weight_decay_mask
from fastvim_jax.training.schedules import warmup_linear
from fastvim_jax.training.segmentation.config import ADE20K_OPTIMIZER
from tests.dense.golden import fixtures, read, table

SCHEDULES = [path for path, kind in fixtures().items() if kind == "mmengine schedulers"]


@pytest.mark.skipif(not SCHEDULES, reason="no golden numbers here: set FASTVIM_DENSE_DIR")
def test_learning_rates_of_160000_steps():
    golden = read(SCHEDULES[0])
    steps, expected = golden.inputs["seg_iters"], golden.outputs["seg_lr"]
    exact = warmup_linear(peak=6e-5, total_steps=160_000, warmup_steps=1500, start=6e-11)
    np.testing.assert_allclose(exact(steps), expected, rtol=1e-9, atol=1e-18)
    # A run counts whole epochs: its warm-up is the recipe's, its line ends a little later.
    rate = learning_rate_schedule(ADE20K_OPTIMIZER, batch_size=16, steps_per_epoch=1263, epochs=127)
    np.testing.assert_allclose(rate(steps[:9]), expected[:9], rtol=1e-9)


def test_which_parameters_decay():
    expected = table("dense_param_groups.json")
    if expected is None:
        pytest.skip("no golden numbers here: set FASTVIM_DENSE_DIR")
    stored = expected["segmentation_authors"]
    backbone = VisionMambaConfig(
        image_size=32, embed_dim=16, depth=24, state_size=4, num_classes=0, norm="rms",
        out_indices=(5, 11, 17, 23),
    )  # fmt: skip
    config = UperNetConfig(backbone, num_classes=5, channels=8, auxiliary_channels=6)
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    mask = weight_decay_mask(params, "segmentation")
    full = jax.tree.map(lambda leaf, decayed: jnp.full(leaf.shape, decayed), params, mask)
    found = {name: value.all() for name, value in to_torch_names(model, full).items()}
    assert set(found) == set(stored)
    wrong = [name for name in stored if found[name] != (stored[name]["weight_decay"] > 0)]
    assert not wrong, wrong
    assert {entry["lr"] for entry in stored.values()} == {ADE20K_OPTIMIZER.learning_rate}

"""Rates and decay of the detection recipe, as meant and as released, against the reference's own tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.interop import to_torch_names
from fastvim_jax.models import VisionMambaConfig, build_model, cascade_mask_rcnn
from fastvim_jax.training.detection.config import COCO_OPTIMIZER
from fastvim_jax.training.optimizer import (
    learning_rate_scales,
    learning_rate_schedule,
    weight_decay_mask,
)
from fastvim_jax.training.schedules import warmup_step
from tests.dense.golden import fixtures, read, table

SCHEDULES = [path for path, kind in fixtures().items() if kind == "mmengine schedulers"]


@pytest.mark.skipif(not SCHEDULES, reason="no golden numbers here: set FASTVIM_DENSE_DIR")
def test_learning_rates_of_184375_steps():
    golden = read(SCHEDULES[0])
    steps, expected = golden.inputs["det_iters"], golden.outputs["det_lr"]
    rate = warmup_step(
        peak=1e-4,
        total_steps=184_375,
        warmup_steps=250,
        start=1e-7,
        milestones=COCO_OPTIMIZER.milestones,
    )
    np.testing.assert_allclose(rate(steps), expected, rtol=1e-9)
    run = learning_rate_schedule(COCO_OPTIMIZER, batch_size=64, steps_per_epoch=1848, epochs=100)
    first = steps < 10_000
    np.testing.assert_allclose(run(steps[first]), expected[first], rtol=1e-9)


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize(
    ("name", "groups", "rule"),
    [
        ("detection_intended_depth24", "detection", "blocks"),
        ("detection_authors_as_run", "detection_released", "detection_released"),
    ],
)
def test_rate_and_decay_of_every_parameter(name, groups, rule):
    expected = table("dense_param_groups.json")
    if expected is None:
        pytest.skip("no golden numbers here: set FASTVIM_DENSE_DIR")
    stored = expected[name]
    backbone = VisionMambaConfig(image_size=32, embed_dim=16, depth=24, state_size=4, norm="rms")
    config = cascade_mask_rcnn(backbone, num_classes=5, width=8, hidden=20)
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    params = nnx.state(model)

    def by_name(values):
        full = jax.tree.map(lambda leaf, value: jnp.broadcast_to(value, leaf.shape), params, values)
        return {k: np.unique(np.asarray(v)) for k, v in to_torch_names(model, full).items()}

    shaped = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), params)
    scales = by_name(learning_rate_scales(shaped, COCO_OPTIMIZER.layer_decay, rule))
    decayed = by_name(weight_decay_mask(params, groups))
    assert set(scales) == set(stored)
    for key, entry in stored.items():
        np.testing.assert_allclose(scales[key], entry["lr_scale"], rtol=1e-6, err_msg=key)
        assert decayed[key] == (entry["weight_decay"] > 0), key
        assert entry["weight_decay"] in (0, COCO_OPTIMIZER.weight_decay)

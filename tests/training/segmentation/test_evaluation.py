"""Scores of an evaluation are those of all its images, or it says which it leaves out."""

from __future__ import annotations

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.segmentation import EvaluationImages
from fastvim_jax.distributed import MeshConfig, make_mesh
from fastvim_jax.layers.resize import resize_bilinear
from fastvim_jax.models.upernet import SegmentationLogits
from fastvim_jax.training.segmentation.evaluation import (
    judge,
    make_evaluator,
    slide_of,
    window_logits,
)
from fastvim_jax.training.steps import TrainState
from tests.training.segmentation.tiny import draw_scenes, tiny_config


def test_images_that_cannot_be_judged_stop_a_run_unless_it_allows_them(tmp_path, rng):
    draw_scenes(tmp_path, rng, train=1, held_out=3)
    config = tiny_config(tmp_path)
    file = tmp_path / "annotations/validation/scene_1.png"
    with Image.open(file) as mask:
        labels = np.asarray(mask).copy()
    labels[3, 3] = 3  # a label too many
    Image.fromarray(labels).save(file)

    def predict(windows):
        return jnp.zeros((len(windows), 2, 2, 3))

    with contextlib.closing(EvaluationImages(config.data)) as images:
        run = make_evaluator(
            lambda params, model_state, windows: predict(windows), images, config,
            make_mesh(MeshConfig(data=1)), tmp_path, progress=False,
        ).run  # fmt: skip
        state = TrainState(0, None, None, None)
        with pytest.raises(
            DecodeError, match=r"scene_1.png: labels 3 outside(.|\n)*1 image of"
        ) as raised:
            run(state, 0)
        assert "data.max_corrupt allows 0" in str(raised.value)
        slide = slide_of(config, 2)
        for most in (1, None):
            areas, _, unread = judge(predict, images, slide, 3, most_unread=most)
            assert len(unread) == 1 and areas.labelled.sum() > 0


@pytest.mark.parametrize(
    ("size", "neck"),
    [((21, 27), "none"), ((3, 32), "none"), ((3, 32), "multilevel"), ((32, 32), "none")],
)
def test_logits_of_small_windows_lie_where_their_pixels_do(tmp_path, size, neck):
    """Let each patch give its mean: a ramp comes out as it went in, up to the middle of the last whole patch."""
    config = tiny_config(tmp_path)  # patches of 8 pixels, crops of 32
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, neck=neck))
    seen = []

    def model(images):
        seen.append(images.shape[1:3])
        images = jnp.pad(
            images, ((0, 0), (0, -images.shape[1] % 8), (0, -images.shape[2] % 8), (0, 0))
        )
        rows, columns = (side // 8 for side in images.shape[1:3])
        return SegmentationLogits(images.reshape(-1, rows, 8, columns, 8, 3).mean((2, 4)), None)

    ramp = np.broadcast_to(np.indices(size).sum(0)[None, ..., None] * 4, (1, *size, 3)).astype(
        np.uint8
    )
    found = np.asarray(resize_bilinear(window_logits(model, jnp.asarray(ramp), config), size))[0]
    assert seen == [(-(-size[0] // 8) * 8 if neck == "none" else 16, -(-size[1] // 8) * 8)]
    expected = (ramp[0] / 255 - config.data.mean) / np.asarray(config.data.std)
    middle = tuple(slice(4, side // 8 * 8 - 4) for side in size)
    np.testing.assert_allclose(found[middle], expected[middle], atol=1e-4)
    assert found.shape == (*size, 3)

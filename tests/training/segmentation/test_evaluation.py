"""Scores of an evaluation are those of all its images, or it says which it leaves out."""

from __future__ import annotations

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.segmentation import EvaluationImages
from fastvim_jax.distributed import MeshConfig, make_mesh
from fastvim_jax.layers.resize import resize_bilinear
from fastvim_jax.training.segmentation import evaluation
from fastvim_jax.training.segmentation.evaluation import (
    extended_logits,
    judge,
    make_evaluator,
    slide_of,
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


def test_an_image_that_another_process_cannot_read_is_left_out(tmp_path, rng, monkeypatch):
    """Leave it out in all processes. Otherwise one would run the model more often and wait for the others."""
    draw_scenes(tmp_path, rng, train=1, held_out=3)
    config = tiny_config(tmp_path)
    answers = iter([False, True, False])
    monkeypatch.setattr(evaluation, "on_any_process", lambda mine: mine or next(answers))
    seen = []

    def predict(windows):
        seen.append(windows)
        return jnp.zeros((len(windows), 2, 2, 3))

    with contextlib.closing(EvaluationImages(config.data)) as images:
        _, _, unread = judge(predict, images, slide_of(config, 8), 3)
    assert len(unread) == 1 and unread[0].endswith("scene_1.jpg: another process cannot read it.")
    assert len(seen) == 2  # the others


def test_an_image_without_labels_is_none_of_the_worst(tmp_path, rng):
    draw_scenes(tmp_path, rng, train=1, held_out=3)
    config = tiny_config(tmp_path)
    file = tmp_path / "annotations/validation/scene_1.png"
    with Image.open(file) as mask:
        Image.fromarray(np.full(mask.size[::-1], 255, np.uint8)).save(file)
    predict = lambda windows: jnp.zeros((len(windows), 2, 2, 3))  # noqa: E731
    with contextlib.closing(EvaluationImages(config.data)) as images:
        _, judged, _ = judge(predict, images, slide_of(config, 2), 3, keep=1)
    assert [each.name for each in judged] == ["scene_0.jpg", "scene_2.jpg"]


@pytest.mark.parametrize("size", [(21, 27), (3, 32), (32, 32)])
def test_logits_of_small_windows_lie_where_their_pixels_do(size):
    """Let each patch of 8 pixels give its mean: a ramp comes out as it went in, up to the middle of the last one.

    The model sees what training shows it: crops that windows do not fill.
    """
    seen = []

    def logits_of(batch):
        seen.append(batch)
        return jnp.asarray(batch["image"]).reshape(-1, 4, 8, 4, 8, 3).mean((2, 4))

    ramp = np.broadcast_to(np.indices(size).sum(0)[None, ..., None] * 4, (1, *size, 3))
    logits = extended_logits(logits_of, ramp.astype(np.uint8), (32, 32))
    found = np.asarray(resize_bilinear(logits, size))[0]
    assert found.shape == (*size, 3)
    middle = tuple(slice(4, side // 8 * 8 - 4) for side in size)
    np.testing.assert_allclose(found[middle], ramp[0][middle], atol=1e-3)
    (batch,) = seen
    image = batch["image"]
    np.testing.assert_array_equal(image[:, : size[0], : size[1]], ramp)
    assert image.shape == (1, 32, 32, 3) and batch["size"].tolist() == [list(size)]
    assert not image[0, size[0] :].any() and not image[0, :, size[1] :].any()

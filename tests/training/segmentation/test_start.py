"""Weights into a segmentation model: a classifier's backbone with positions resized, and mmseg's checkpoints."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
from flax import nnx

from fastvim_jax.data import ClassificationData
from fastvim_jax.errors import UserError
from fastvim_jax.interop import from_torch_state_dict, to_torch_state_dict
from fastvim_jax.models import MaskedAutoencoderConfig, VisionMambaConfig, build_model, upernet
from fastvim_jax.models.saving import save_pretrained
from fastvim_jax.training import train
from fastvim_jax.training.masked.config import PretrainConfig
from fastvim_jax.training.pool_scale import with_scale_of_init
from fastvim_jax.training.start_from import load_weights
from tests.training.detection.tiny import tiny_config as detection_config
from tests.training.segmentation.tiny import tiny_config as segmentation_config

CLASSIFIER = VisionMambaConfig(
    image_size=32, patch_size=8, embed_dim=8, depth=4, state_size=4, num_classes=5
)


def segmentor(seed: int) -> nnx.Module:
    config = upernet(CLASSIFIER, image_size=48, num_classes=3, channels=8, auxiliary_channels=4)
    return build_model(config, rngs=nnx.Rngs(seed))


def test_the_backbone_of_a_classifier_is_taken(tmp_path):
    classifier = build_model(CLASSIFIER, rngs=nnx.Rngs(0))
    save_pretrained(classifier, tmp_path / "saved")
    model = segmentor(1)
    report = load_weights(model, tmp_path / "saved")
    for ours, theirs in (
        (model.backbone.blocks.mixer.in_proj.kernel, classifier.blocks.mixer.in_proj.kernel),
        (model.backbone.patch_embed.proj.kernel, classifier.patch_embed.proj.kernel),
    ):
        np.testing.assert_array_equal(ours[...], theirs[...])
    assert model.backbone.pos_embed.shape == (1, 36, 8)
    assert report.names("resized") == ["backbone.pos_embed"]
    drawn = {name.split(".")[0] for name in report.names("drawn")}
    assert drawn == {"backbone", "decode_head", "auxiliary_head"}  # of the backbone: out_norms
    assert {name.split(".")[0] for name in report.names("left")} == {"head", "norm"}


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_backbone_from_a_masked_run_gets_its_pooling_scale(task, tmp_path, monkeypatch):
    """Scale the pooling, because the rows that the backbone was trained on lacked most of their tokens.

    See `training.pool_scale`.
    """
    encoder = dataclasses.replace(CLASSIFIER, num_classes=0)
    masked = MaskedAutoencoderConfig(encoder=encoder, mask_ratio=0.6, decoder_dim=8)
    data = ClassificationData(image_size=32)
    (tmp_path / "masked").mkdir()
    saved = PretrainConfig(model=masked, data=data).to_json()
    (tmp_path / "masked" / "config.json").write_text(saved)
    build = segmentation_config if task == "segmentation" else detection_config
    config = build(tmp_path, init=str(tmp_path / "masked"))
    started = with_scale_of_init(config, tmp_path / "new")
    assert started.model.backbone.pool_scale == pytest.approx(0.4)
    told = dataclasses.replace(config, scale_from_init=False)
    assert with_scale_of_init(told, tmp_path / "new") is told
    # A resumed run does not need the masked one.
    (tmp_path / "new" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "new" / "config.json").write_text(started.to_json())
    # A start without the scale that left no checkpoint decides nothing.
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "config.json").write_text(told.to_json())
    assert with_scale_of_init(config, tmp_path / "stopped") == started
    (tmp_path / "masked" / "config.json").unlink()
    assert with_scale_of_init(config, tmp_path / "new") == started

    class Asked(Exception):
        """The trainer asks for the scale before anything else."""

    def ask(*_):
        raise Asked

    trainer = importlib.import_module(f"fastvim_jax.training.{task}.train")
    monkeypatch.setattr(trainer, "with_scale_of_init", ask)
    with pytest.raises(Asked):
        train(config, tmp_path / "run", progress=False)


def test_a_checkpoint_of_mmseg_goes_in_and_out():
    """Ignore the counts of batches that mmseg's batch norms keep, because nothing here reads them."""
    saved = to_torch_state_dict(segmentor(2))
    counted = saved | {
        name.replace("running_mean", "num_batches_tracked"): np.asarray(7)
        for name in saved
        if name.endswith("running_mean")
    }
    model = segmentor(3)
    from_torch_state_dict(model, counted)
    for name, value in to_torch_state_dict(model).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)
    with pytest.raises(UserError, match="unexpected: decode_head.other"):
        from_torch_state_dict(model, counted | {"decode_head.other": np.zeros(1)})

"""UperNet on every kind of backbone, and what it refuses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.analysis.segmentation_flops import segmentation_gmacs
from fastvim_jax.errors import UserError
from fastvim_jax.models import build_model, model_config, upernet
from fastvim_jax.models.segmentation.necks import MultiLevelNeck
from fastvim_jax.models.upernet import quarter_blocks
from fastvim_jax.precision import Precision
from tests.support import checked

SMALL = {"embed_dim": 8, "depth": 4, "patch_size": 8, "num_classes": 10}
BACKBONES = {
    "fastvim": model_config("fastvim_tiny_patch16_224", state_size=4, **SMALL),
    "vim": model_config("vim_tiny_patch16_224", state_size=4, **SMALL),
    "fastchannelvim": model_config(
        "fastchannelvim_tiny_patch8_224", state_size=4, channels=3, **SMALL
    ),
    "vit": model_config("vit_tiny_patch16_224", num_heads=2, **SMALL),
}


def small(backbone: str, **options):
    return upernet(
        BACKBONES[backbone], image_size=32, num_classes=3, channels=8, auxiliary_channels=4,
        pool_scales=(1, 2), **options,
    )  # fmt: skip


@pytest.mark.drawn("options of models")
@pytest.mark.parametrize(
    ("backbone", "neck", "finest"),
    [
        ("fastvim", "none", 1),
        ("vim", "deconvolution", 4),
        ("vit", "multilevel", 4),
        ("fastchannelvim", "none", 1),
    ],
)
def test_any_backbone_neck_and_crop(backbone, neck, finest, rng):
    """Run crops of another size and shape than the position embeddings' with any backbone and neck."""
    model = build_model(small(backbone, neck=neck), rngs=nnx.Rngs(0))
    images = jnp.asarray(rng.normal(size=(2, 40, 24, 3)), jnp.float32)
    logits = jax.jit(lambda model, x: model(x, train=True))(model, images)
    assert logits.main.shape == (2, 5 * finest, 3 * finest, 3)
    assert logits.auxiliary.shape == (2, 5, 3, 3)
    assert np.isfinite(logits.main).all()
    assert segmentation_gmacs(small(backbone, neck=neck))["backbone"] > 0


def test_classes_are_those_of_the_largest_resized_logits(rng):
    model = build_model(small("fastvim"), rngs=nnx.Rngs(0))
    images = jnp.asarray(rng.normal(size=(2, 40, 24, 3)), jnp.float32)
    found = jax.jit(lambda model, x: model.classes(x))(model, images)
    logits = np.asarray(jax.jit(lambda model, x: model.segment(x))(model, images))
    assert logits.shape == (2, 40, 24, 3)
    np.testing.assert_array_equal(found, logits.argmax(-1))
    assert len(np.unique(found)) > 1


def test_the_multilevel_neck_halves_odd_sizes_by_means_of_2_x_2_cells(rng):
    neck = MultiLevelNeck((3,) * 4, 3, precision=Precision("float32", "float32"), rngs=nnx.Rngs(0))
    x = rng.normal(size=(2, 5, 7, 3)).astype(np.float32)
    lateral, output = neck.laterals[3], neck.outputs[3]
    lateral.kernel[...] = jnp.eye(3)[None, None]  # Both convolutions copy.
    output.kernel[...] = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    *_, last = neck([jnp.asarray(x)] * 4, train=False)
    expected = x[:, :4, :6].reshape(2, 2, 2, 3, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-6)


def test_dropout_and_drop_path_are_drawn_by_key():
    config = small("fastvim")
    config = dataclasses.replace(
        config, dropout=0.5, backbone=dataclasses.replace(config.backbone, drop_path=0.5)
    )
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    first, again, other = (model.draw(jax.random.key(seed), 64) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (np.asarray(a) != np.asarray(c)).any()
    assert abs(float(first.main.mean()) - 0.5) < 0.15 and first.drop_path.shape == (4, 64)


def test_quarters_of_the_depth():
    assert quarter_blocks(24) == (5, 11, 17, 23) and quarter_blocks(12) == (2, 5, 8, 11)
    assert small("fastvim").backbone.out_indices == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": "fpn"}, "neck"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_classes": 1}, "num_classes"),
        ({"auxiliary_level": 4}, "auxiliary_level"),
        ({"pool_scales": ()}, "pool_scales"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        checked(small("fastvim"), **options)


def test_a_backbone_without_four_blocks_to_read_is_refused():
    backbone = dataclasses.replace(BACKBONES["fastvim"], out_indices=(1, 3), num_classes=0)
    with pytest.raises(UserError, match="four blocks"):
        upernet(backbone)

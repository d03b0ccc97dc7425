"""A configuration is told from PyTorch names and shapes: what the names can tell comes back exactly."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from fastvim_jax import UserError
from fastvim_jax.interop import recognise, to_torch_names
from fastvim_jax.interop.recognise import assumptions
from fastvim_jax.models import build_model, list_models, model_config
from fastvim_jax.models.config import replace_options

SMALL = {"image_size": 8, "patch_size": 4, "embed_dim": 64, "depth": 3}


def shapes_of(config):
    """Return names and shapes without computing a weight."""

    def names():
        model = build_model(config, rngs=nnx.Rngs(0))
        return to_torch_names(model, nnx.state(model))

    shapes = jax.eval_shape(names)
    return {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}


CASES = [
    ("fastvim_tiny_patch16_224", SMALL),
    ("vim_tiny_patch16_224", {**SMALL, "num_classes": 7}),
    (
        "fastvim_tiny_patch16_224",
        {**SMALL, "pooling": "attention", "channels": 5, "num_classes": 0},
    ),
    ("fastvim_tiny_patch16_224", {**SMALL, "norm": "layer", "post_norm": "rms", "conv_width": 0}),
    ("fastvim_tiny_patch16_224", {**SMALL, "post_norm": "none", "proj_bias": True, "dt_rank": 5}),
    ("fastvim_tiny_patch16_224", {**SMALL, "state_size": 4, "expand": 3, "conv_bias": False}),
    ("vit_tiny_patch16_224", {**SMALL, "num_heads": 1, "mlp_ratio": 3.0, "qkv_bias": False}),
    ("vit_tiny_patch16_224", {**SMALL, "num_heads": 1, "head_pool": "mean"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_names_and_shapes_tell_comes_back(name, options):
    config = model_config(name, **options)
    found = recognise(shapes_of(config), **({"drop_path": config.drop_path}))
    rank = {} if name.startswith("vit") else {"dt_rank": found.dt_rank}
    assert found == model_config(name, **{**options, **rank, "norm_eps": found.norm_eps})


@pytest.mark.parametrize(
    "name", ["fastvim_base_patch16_224", "fastvim_huge_patch14_224", "vit_base_patch16_224"]
)
def test_presets_are_recognised(name):
    assert name in list_models()
    config = model_config(name)
    found = recognise(shapes_of(config), drop_path=config.drop_path)
    assert (found.image_size, found.patch_size, found.depth) == (
        config.image_size, config.patch_size, config.depth,
    )  # fmt: skip


def test_heads_that_shapes_do_not_tell_are_those_of_the_published_models():
    config = model_config("vit_large_patch16_224", embed_dim=1280, depth=1, num_heads=16)  # ViT-H
    assert recognise(shapes_of(config)).num_heads == 16
    for name in ("mae_vit_tiny_patch16_224", "mae_vit_base_patch16_224"):
        config = model_config(name, depth=1, decoder_depth=1)
        assert recognise(shapes_of(config)).decoder_heads == config.decoder_heads == 16


def test_heads_given_as_options_are_taken_whatever_the_usual_number_is():
    """Take the given number of heads also where the usual number, 3 for both widths, would not divide the width."""
    small = {"image_size": 8, "patch_size": 4, "depth": 1, "decoder_depth": 1}
    heads = {"num_heads": 4, "decoder_heads": 5}
    config = model_config(
        "mae_vit_tiny_patch16_224", **small, embed_dim=200, decoder_dim=100, **heads
    )
    arrays = shapes_of(config)
    found = recognise(arrays, **heads)
    assert (found.encoder.num_heads, found.decoder_heads) == (4, 5)
    assert recognise(arrays, num_heads=4).decoder_heads == 2
    assert assumptions(recognise(arrays)) == {
        "num_heads": 2, "norm_eps": 1e-6, "decoder_heads": 2, "mask_ratio": config.mask_ratio,
    }  # fmt: skip


OTHER = {
    "pooling": ("max", "mean", "none"), "pool_axes": ("columns", "two_axes"), "pool_scale": (0.5,),
    "unpool": ("after_skip",), "token_order": ("column",), "head_pool": ("max", "last", "mean"),
    "norm_eps": (1e-3,), "class_token": ("head",), "norm": ("layer",), "post_norm": ("none", "rms"),
    "conv_width": (3, 0), "conv_bias": (False,), "proj_bias": (True,), "state_size": (8,), "expand": (1,),
    "dt_rank": (3,), "num_heads": (2,), "mlp_ratio": (3.0,), "qkv_bias": (False,), "scan_order": ("spatial",),
    "stride": (2,), "layer_scale": (0.1,), "pos_embed": (False,),
}  # fmt: skip


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("name", ["fastvim", "vim", "vit", "fastchannelvim", "channelvit"])
def test_what_names_and_shapes_do_not_tell_is_listed(name):
    """Change one field at a time: it comes back, or `assumptions` lists it, or another field leaves it no effect."""
    heads = {"num_heads": 1} if "vit" in name else {}
    base = model_config(f"{name}_tiny_patch16_224", **SMALL | heads | {"depth": 1})
    silent = []
    for field, values in OTHER.items():
        for value in values if hasattr(base, field) else ():
            try:
                config = replace_options(base, **{field: value})
                arrays = shapes_of(config)
            except (UserError, TypeCheckError):  # no value of this class, or not beside the others
                continue
            if field in ("pool_axes", "conv_width") and config.pooling == "none" and name != "vim":
                continue
            if field in ("unpool", "head_pool", "pool_axes") and name == "vim":  # nothing is pooled
                continue
            found = recognise(arrays)
            if field not in assumptions(found) and not np.all(found.__dict__[field] == value):
                silent.append((field, value, found.__dict__[field]))
    assert not [each for each in silent if each[0] != "layer_scale"]


def test_options_override_and_other_weights_are_refused():
    arrays = shapes_of(model_config("fastvim_tiny_patch16_224", **SMALL))
    assert recognise(arrays, pooling="max").pooling == "max"
    vit = shapes_of(model_config("vit_tiny_patch16_224", num_heads=4, **SMALL))
    for name, shape, said in (
        ("patch_embed.proj.weight", (0, 3, 16, 16), "other axes than a ViTConfig"),
        ("pos_embed", (), r"pos_embed, of shape \(\), has no entry for each patch"),
        ("pos_embed", (1, 0, 12), r"pos_embed, of shape \(1, 0, 12\), has no entry"),
    ):
        with pytest.raises(UserError, match=said):
            recognise(vit | {name: np.zeros(shape)})
    with pytest.raises(UserError, match="of no model that is known here"):
        recognise({"conv1.weight": np.zeros((3, 3))})


@pytest.mark.parametrize("name", ["fastvim", "vit"])
def test_feature_maps_are_asked_for_by_their_blocks(name):
    config = model_config(
        f"{name}_tiny_patch16_224", **SMALL | {"embed_dim": 192, "depth": 4, "out_indices": (1, 3)}
    )
    with pytest.raises(UserError, match=r"2 feature maps .* 4 blocks: .* out_indices=\[1, 3\]"):
        recognise(shapes_of(config))
    assert recognise(shapes_of(config), out_indices=(1, 3)).out_indices == (1, 3)

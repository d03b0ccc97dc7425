"""Tell from the names and shapes of PyTorch weights which model they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvim_jax.errors import UserError
from fastvim_jax.models import VisionMambaConfig, ViTConfig
from fastvim_jax.models.config import ModelConfig, replace_options

Arrays = Mapping[str, np.ndarray]


def recognise(arrays: Arrays, **options: Any) -> ModelConfig:
    """Find the configuration whose model has these weights.

    Names and shapes tell widths, depth, patches, channels, classes, norms and the class token. They do not tell how
    tokens are pooled, so a class token is taken for a Vim (no pooling, the token in the middle) and its absence for a
    FastVim (means, rows and columns in turn); nor the sides of an image that is not square, nor heads of another width
    than 64. Give `options` for those.

    Args:
        arrays: state-dict names, as the authors or timm write them, to arrays.
        **options: fields of the configuration that override what was recognised.

    Raises:
        UserError: the names are of no model of this library.
    """
    if "layers.0.mixer.in_proj.weight" in arrays:
        config: ModelConfig = VisionMambaConfig(**_vision_mamba(arrays))
    elif "blocks.0.attn.qkv.weight" in arrays:
        config = ViTConfig(**_vision_transformer(arrays))
    else:
        shown = ", ".join(list(arrays)[:5])
        raise UserError(
            f"the names {shown}, ... are of no model that is known here: FastVim and Vim have "
            "layers.0.mixer.in_proj.weight, ViT and DeiT blocks.0.attn.qkv.weight. Name the model."
        )
    return replace_options(config, **options)


def _vision_mamba(arrays: Arrays) -> dict[str, Any]:
    found = _common(arrays, "layers")
    width = found["embed_dim"]
    mixer = "layers.0.mixer."
    inner, states = arrays[mixer + "A_log"].shape
    token = "cls_token" in arrays
    conv = mixer + "conv1d.weight"
    gamma = arrays.get(mixer + "gamma")
    return found | {
        "pooling": "none" if token else "attention" if mixer + "score.weight" in arrays else "mean",
        "class_token": "middle" if token else "none",
        "pos_embed": "pos_embed" in arrays,
        "norm": "layer" if "layers.0.norm.bias" in arrays else "rms",
        "post_norm": _norm_kind(arrays, mixer + "layernorm"),
        "state_size": states,
        "expand": inner // width,
        "dt_rank": arrays[mixer + "dt_proj.weight"].shape[1],
        "conv_width": arrays[conv].shape[-1] if conv in arrays else 0,
        "conv_bias": mixer + "conv1d.bias" in arrays or conv not in arrays,
        "proj_bias": mixer + "in_proj.bias" in arrays,
        "layer_scale": None if gamma is None else float(gamma.flat[0]),
    }


def _vision_transformer(arrays: Arrays) -> dict[str, Any]:
    found = _common(arrays, "blocks")
    width = found["embed_dim"]
    return found | {
        "num_heads": max(1, width // 64),
        "mlp_ratio": arrays["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in arrays,
        "head_pool": "mean" if "fc_norm.weight" in arrays else "token",
    }


def _common(arrays: Arrays, blocks: str) -> dict[str, Any]:
    patch = arrays.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        raise UserError(
            "the weights have no patch embedding of four axes (patch_embed.proj.weight)."
        )
    width, channels, height, across = patch.shape
    depth = 1 + max(int(n.split(".")[1]) for n in arrays if n.startswith(f"{blocks}."))
    found = {
        "embed_dim": width,
        "depth": depth,
        "channels": channels,
        "patch_size": (height, across),
        "num_classes": arrays["head.weight"].shape[0] if "head.weight" in arrays else 0,
    }
    if "pos_embed" in arrays:
        patches = arrays["pos_embed"].shape[1] - ("cls_token" in arrays)
        side = math.isqrt(patches)
        if side * side == patches:
            found["image_size"] = (side * height, side * across)
    return found


def _norm_kind(arrays: Arrays, name: str) -> str:
    if f"{name}.bias" in arrays:
        return "layer"
    return "rms" if f"{name}.weight" in arrays else "none"

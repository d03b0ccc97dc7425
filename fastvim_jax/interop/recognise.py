"""Find out from the names and shapes of PyTorch weights which model they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastvim_jax.errors import UserError, counted
from fastvim_jax.interop.torch_names import resolve_aliases
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig, replace_options
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig, replace_masked_options
from fastvim_jax.models.presets import AnyModelConfig

Arrays = Mapping[str, np.ndarray]
_CHANNEL_EMBEDDINGS = ("patch_embed.channel_embed.weight", "patch_embed.channel_embed")


def recognise(arrays: Arrays, **options: Any) -> AnyModelConfig:
    """Find the configuration whose model has these weights.

    Names and shapes determine the family (a decoder means masked pre-training, a channel embedding cell images),
    widths, depth, patches, channels, classes, norms and the class token. `assumptions` lists the fields that they do
    not determine: give these as `options` if the defaults are wrong.

    Args:
        arrays: state-dict names, as the authors or timm write them, to arrays.
        **options: fields of the configuration that override what was recognised; for a masked autoencoder also fields
            of its encoder.

    Raises:
        UserError: no model of this library has these names; the position table fits no square grid and `options` has no
            `image_size`; there are norms of feature maps and `options` has no `out_indices`.
    """
    plain: Any
    of_channels: Any
    if "layers.0.mixer.in_proj.weight" in arrays:
        read_fields, plain, of_channels = _vision_mamba, VisionMambaConfig, ChannelMambaConfig
    elif "blocks.0.attn.qkv.weight" in arrays:
        read_fields, plain, of_channels = _vision_transformer, ViTConfig, ChannelViTConfig
    else:
        raise UserError(_unknown(arrays))
    try:
        fields = read_fields(arrays)
    except KeyError as error:
        raise UserError(
            f"the weights have no entry {error}, as every {plain.__name__} has."
        ) from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the weights have other axes than a {plain.__name__}: {error}.") from None
    maps = sum(name.startswith("outnorm_") and name.endswith(".weight") for name in arrays)
    if maps and "out_indices" not in options:
        raise UserError(
            f"the weights are of a backbone with {counted(maps, 'feature map')} (outnorm_*), and nothing in them says "
            f"after which of the {fields['depth']} blocks: give out_indices, for example out_indices="
            f"{[(i + 1) * fields['depth'] // maps - 1 for i in range(maps)]}."
        )
    side = table_side(arrays)
    if side is not None:
        step = _pair(options.get("stride") or fields["patch_size"])
        size = [(side - 1) * s + p for s, p in zip(step, fields["patch_size"], strict=True)]
        fields["image_size"] = tuple(size)
    elif "pos_embed" in arrays and "image_size" not in options:
        raise UserError(
            f"the position table pos_embed, of shape {arrays['pos_embed'].shape}, has no entry for each patch of a "
            "square grid: give image_size (height, width)."
        )
    if _has_channels(arrays):
        return replace_options(of_channels(**fields), **options)
    if "decoder_embed.weight" not in arrays:
        return replace_options(plain(**fields), **options)
    width = arrays["decoder_embed.weight"].shape[0]
    # Published masked autoencoders have 16 decoder heads at every width.
    known = _heads(width, 16 if width % 16 == 0 else width // 32)
    heads: dict[str, Any] = {} if plain is VisionMambaConfig else {"decoder_heads": known}
    fields["head_pool"] = "token" if plain is ViTConfig else "mean"
    masked = MaskedAutoencoderConfig(
        encoder=plain(**fields),
        decoder_dim=width,
        decoder_depth=_depth(arrays, "decoder_blocks"),
        **heads,
    )
    return replace_masked_options(masked, **options)


def assumptions(config: AnyModelConfig) -> dict[str, Any]:
    """Return the fields of a configuration that names and shapes do not determine, with their assumed values."""
    inner = config.encoder if isinstance(config, MaskedAutoencoderConfig) else config
    if isinstance(inner, ViTConfig):
        names = ["num_heads"] + ["pooling"] * (type(config) is ViTConfig)
    elif inner.pooling == "none":
        names = ["pooling"] + ["class_token"] * (inner.class_token != "none")
    elif inner.pooling == "attention":
        names = ["pool_axes", "unpool"]
    else:
        names = ["pooling", "pool_axes", "pool_scale", "unpool"]
    if not isinstance(inner, ViTConfig):
        with_mean = inner is config and inner.num_classes and inner.class_token == "none"
        names += ["token_order"] + ["head_pool"] * bool(with_mean)
    names += ["norm_eps"]
    names += ["scan_order", "stride"] if isinstance(inner, ChannelMambaConfig) else []
    found = {name: getattr(inner, name) for name in names}
    if isinstance(config, MaskedAutoencoderConfig):
        found["mask_ratio"] = config.mask_ratio
        if isinstance(inner, ViTConfig):
            found["decoder_heads"] = config.decoder_heads
    return found


def table_side(arrays: Arrays) -> int | None:
    """Return the side of the square grid of patches that the position table is for, or None if there is none."""
    if "pos_embed" not in arrays or arrays["pos_embed"].ndim != 3:
        return None
    # The class token of ChannelVim has no position.
    mamba_of_channels = _has_channels(arrays) and "norm_f.weight" in arrays
    token = "cls_token" in arrays and not mamba_of_channels
    patches = max(0, arrays["pos_embed"].shape[1] - token)
    side = math.isqrt(patches)
    return side if side and side * side == patches else None


def _unknown(arrays: Arrays) -> str:
    shown = ", ".join(list(arrays)[:5])
    whole = any(name.startswith(("decode_head.", "roi_head.")) for name in arrays)
    what = (
        "of a segmentation or detection model. Load them with from_torch_state_dict into a model of its config"
        if whole
        else "of no model that is known here: FastVim and Vim have layers.0.mixer.in_proj.weight, ViT and DeiT "
        "blocks.0.attn.qkv.weight. Name the model"
    )
    return f"the names {shown}, ... are {what}."


def _vision_mamba(arrays: Arrays) -> dict[str, Any]:
    found = _common(arrays, "layers")
    width = found["embed_dim"]
    mixer = "layers.0.mixer."
    inner, states = arrays[mixer + "A_log"].shape
    token = "cls_token" in arrays
    conv = mixer + "conv1d.weight"
    gamma = arrays.get(mixer + "gamma")
    rank = arrays[mixer + "dt_proj.weight"].shape[1]
    return found | {
        "pooling": "none" if token else "attention" if mixer + "score.weight" in arrays else "mean",
        "class_token": "middle" if token else "none",
        "pos_embed": "pos_embed" in arrays,
        "norm": "layer" if "layers.0.norm.bias" in arrays else "rms",
        "post_norm": _norm_kind(arrays, mixer + "layernorm"),
        "state_size": states,
        "expand": inner // width,
        "dt_rank": None if rank == math.ceil(width / 16) else rank,
        "conv_width": arrays[conv].shape[-1] if conv in arrays else 0,
        "conv_bias": mixer + "conv1d.bias" in arrays or conv not in arrays,
        "proj_bias": mixer + "in_proj.bias" in arrays,
        "layer_scale": None if gamma is None else float(gamma.flat[0]),
    }


def _vision_transformer(arrays: Arrays) -> dict[str, Any]:
    found = _common(arrays, "blocks")
    width = found["embed_dim"]
    return found | {
        # Heads are 64 wide up to ViT-L; huge, giant and gigantic ViTs have 16 wider ones.
        "num_heads": _heads(width, width // 64 if width <= 1024 else 16),
        "mlp_ratio": arrays["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in arrays,
        "head_pool": "mean" if "fc_norm.weight" in arrays else "token",
    }


def _heads(width: int, most: int) -> int:
    """Return the largest number of heads that divides a width, at most `most`; 1 at least."""
    return next((heads for heads in range(most, 1, -1) if width % heads == 0), 1)


def _common(arrays: Arrays, blocks: str) -> dict[str, Any]:
    patch = arrays.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != (5 if _has_channels(arrays) else 4):
        raise UserError(
            "the weights have no patch embedding (patch_embed.proj.weight of four axes; of five, with a channel "
            "embedding beside it, in models of cell images)."
        )
    channels = patch.shape[1]
    if _has_channels(arrays):
        known = resolve_aliases({n: arrays[n] for n in _CHANNEL_EMBEDDINGS if n in arrays})
        channels = len(known[_CHANNEL_EMBEDDINGS[0]])
    return {
        "embed_dim": patch.shape[0],
        "depth": _depth(arrays, blocks),
        "channels": channels,
        "patch_size": patch.shape[-2:],
        "num_classes": arrays["head.weight"].shape[0] if "head.weight" in arrays else 0,
    }


def _depth(arrays: Arrays, blocks: str) -> int:
    return 1 + max((int(n.split(".")[1]) for n in arrays if n.startswith(f"{blocks}.")), default=-1)


def _has_channels(arrays: Arrays) -> bool:
    return any(name in arrays for name in _CHANNEL_EMBEDDINGS)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _norm_kind(arrays: Arrays, name: str) -> str:
    if f"{name}.bias" in arrays:
        return "layer"
    return "rms" if f"{name}.weight" in arrays else "none"

"""Authors' state dict -> the oracle's parameters: a conversion of the tests' own, so that the oracle's agreement with
the golden numbers does not lean on `fastvim_jax.interop`."""

from __future__ import annotations

import re

import numpy as np

TOP = {
    "pos_embed": "pos_embed",
    "cls_token": "class_token",
    "norm_f": "norm",
    "norm": "norm",
    "fc_norm": "fc_norm",
    "head": "head",
    "patch_embed.proj": "patch_embed.proj",
}
LEAF = {"weight": "kernel", "bias": "bias"}


def oracle_parameters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every entry of a FastVim, Vim or ViT state dict under the oracle's name and layout, in float64."""
    return dict(convert(name, np.asarray(value, np.float64)) for name, value in state.items())


def masked_parameters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every entry of a masked autoencoder's state dict under the oracle's name, without the fixed tables."""
    params = {}
    for name, value in state.items():
        if name.endswith("pos_embed"):
            continue
        value = np.asarray(value, np.float64)
        decoder = name.startswith("decoder_") or name == "mask_token"
        if name in DECODER:
            ours, out = (
                DECODER[name],
                value.T if name.endswith("weight") and value.ndim == 2 else value,
            )
        elif decoder:
            mamba = re.match(r"decoder_blocks\.\d+\.(mixer|norm)\.", name)
            blocks = "layers" if mamba else "blocks"
            ours, out = convert(name.replace("decoder_blocks", blocks), value)
        else:
            ours, out = convert(name, value)
        params[f"{'decoder' if decoder else 'encoder'}.{ours}"] = out
    return params


DECODER = {
    "mask_token": "mask_token",
    "decoder_embed.weight": "embed.kernel",
    "decoder_embed.bias": "embed.bias",
    "decoder_norm.weight": "norm.scale",
    "decoder_norm.bias": "norm.bias",
    "decoder_pred.weight": "pixels.kernel",
    "decoder_pred.bias": "pixels.bias",
}


def convert(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Convert one entry. Kernels turn from (out, in) to (in, out), convolutions put their channels last."""
    if name in ("pos_embed", "cls_token"):
        return TOP[name], value
    if match := re.fullmatch(r"outnorm_(\d+)\.(weight|bias)", name):
        return f"out_norms.{match[1]}.{'scale' if match[2] == 'weight' else 'bias'}", value
    if match := re.fullmatch(r"layers\.(\d+)\.norm\.(weight|bias)", name):
        return f"blocks.{match[1]}.norm.{'scale' if match[2] == 'weight' else 'bias'}", value
    if match := re.fullmatch(r"layers\.(\d+)\.mixer\.(.+)", name):
        inner, value = convert_mixer(match[2], value)
        return f"blocks.{match[1]}.mixer.{inner}", value
    if match := re.fullmatch(r"(blocks\.\d+\..+)\.(weight|bias)", name):
        if ".norm" in match[1]:
            return f"{match[1]}.{'scale' if match[2] == 'weight' else 'bias'}", value
        return f"{match[1]}.{LEAF[match[2]]}", value.T
    if name == "patch_embed.channel_embed":  # One of the two ChannelViTs keeps it as 1 d k 1 1.
        return name, value[0, :, :, 0, 0].T
    if name == "patch_embed.channel_embed.weight":
        return "patch_embed.channel_embed", value
    stem, _, leaf = name.rpartition(".")
    if stem not in TOP:
        raise KeyError(f"no name for the authors' entry {name!r}")
    if "norm" in stem:
        return f"{TOP[stem]}.{'scale' if leaf == 'weight' else 'bias'}", value
    if stem == "patch_embed.proj":
        if leaf == "bias":
            return f"{TOP[stem]}.bias", value
        value = value[:, :, 0] if value.ndim == 5 else value  # Per channel: d 1 1 p q.
        return f"{TOP[stem]}.kernel", value.transpose(2, 3, 1, 0)
    return f"{TOP[stem]}.{LEAF[leaf]}", value.T


def convert_mixer(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Convert one entry of a mixer; names with `_b` belong to the backward branch."""
    stem, _, leaf = name.rpartition(".")
    if name == "gamma":
        return "layer_scale", value
    if stem == "layernorm":
        return f"post_norm.{'scale' if leaf == 'weight' else 'bias'}", value
    if stem in ("in_proj", "out_proj"):
        return f"{stem}.{LEAF[leaf]}", value.T
    if not stem:
        if name in ("A_log", "D"):
            return f"forward.{name}", value
        if name in ("A_b_log", "D_b"):
            return f"backward.{name.replace('_b', '')}", value
    direction, stem = (
        ("backward", stem.removesuffix("_b")) if stem.endswith("_b") else ("forward", stem)
    )
    if stem == "conv1d":
        return f"{direction}.conv.{LEAF[leaf]}", value[:, 0].T if leaf == "weight" else value
    if stem in ("x_proj", "dt_proj"):
        return f"{direction}.{stem}.{LEAF[leaf]}", value.T
    raise KeyError(f"no name for the authors' mixer entry {name!r}")

"""Find and build models by name."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

import jax

from fastvim_jax.errors import UserError, suggest
from fastvim_jax.models.channel_mamba import ChannelMamba, ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViT, ChannelViTConfig
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig, replace_options
from fastvim_jax.models.detection import CascadeRCNN, DetectorConfig
from fastvim_jax.models.mae import MaskedAutoencoder
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig, replace_masked_options
from fastvim_jax.models.names import understood
from fastvim_jax.models.presets import PRESETS, AnyModelConfig
from fastvim_jax.models.rngs import RngsLike, as_rngs
from fastvim_jax.models.upernet import UperNet, UperNetConfig
from fastvim_jax.models.vision_mamba import VisionMamba
from fastvim_jax.models.vit import VisionTransformer

FAST = {
    "dtype": "bfloat16", "activations": "compute", "residual_in_fp32": False, "blocks": "unroll",
}  # fmt: skip
"""Options that `create_model(..., fast=True)` sets, if the model has them."""
MODEL_CLASSES: dict[type, type] = {
    VisionMambaConfig: VisionMamba,
    ViTConfig: VisionTransformer,
    MaskedAutoencoderConfig: MaskedAutoencoder,
    ChannelMambaConfig: ChannelMamba,
    ChannelViTConfig: ChannelViT,
}


def list_models(pattern: str = "*") -> list[str]:
    """List the models whose names match a shell-style `pattern` (or contain it, if it has no wildcard)."""
    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in PRESETS if fnmatch.fnmatchcase(name, wanted)]


def model_config(name: str, *, fast: bool = False, **options: Any) -> Any:
    """Return the config of the model called `name`, with `options` (fields of its config class) replaced.

    timm's names `in_chans`, `img_size`, `drop_path_rate` and `global_pool` are understood. Dtypes are names or objects.

    Args:
        name: One of `list_models()`.
        fast: Start from `FAST` instead of the exact defaults; see `create_model`.
        **options: Fields of the model's config to change; a masked autoencoder also takes its encoder's fields.

    Raises:
        UserError: the name or an option is unknown (the message suggests the nearest), or a value is impossible.
    """
    if name not in PRESETS:
        raise UserError(
            f"unknown model {name!r}.{suggest(name, PRESETS)} `fastvim models` lists all names."
        )
    config = PRESETS[name]
    if not isinstance(fast, bool):
        raise UserError(f"fast={fast!r} must be True or False.")
    options = understood(options)
    if fast:
        backbone = config.encoder if isinstance(config, MaskedAutoencoderConfig) else config
        fields = {field.name for field in dataclasses.fields(backbone)}
        options = {name: value for name, value in FAST.items() if name in fields} | options
    if isinstance(config, MaskedAutoencoderConfig):
        return replace_masked_options(config, **options)
    return replace_options(config, **options)


def config_class(name: str) -> type:
    """Return the class of model configs called `name`.

    Raises:
        UserError: there is no such class; the message suggests the nearest names.
    """
    known = {each.__name__: each for each in (*MODEL_CLASSES, UperNetConfig, DetectorConfig)}
    if name not in known:
        raise UserError(
            f"no model has a config of class {name!r}.{suggest(name, known)} Known are {', '.join(known)}."
        )
    return known[name]


def build_model(config: AnyModelConfig | UperNetConfig | DetectorConfig, *, rngs: RngsLike) -> Any:
    """Build a freshly initialised model from its configuration.

    Args:
        config: a model's configuration.
        rngs: source of the parameters' randomness: a seed, a JAX key, or `nnx.Rngs`.

    Raises:
        UserError: the config asks for float64, but JAX's 64-bit mode is off: JAX would use float32.
    """
    rngs = as_rngs(rngs)
    if isinstance(config, UperNetConfig):
        return UperNet(config, backbone=build_model(config.backbone, rngs=rngs), rngs=rngs)
    if isinstance(config, DetectorConfig):
        return CascadeRCNN(config, build_model(config.backbone, rngs=rngs), rngs=rngs)
    p = config.precision
    if "float64" in (p.dtype, p.param_dtype) and not jax.config.jax_enable_x64:
        raise UserError(
            f"dtype={p.dtype!r}, param_dtype={p.param_dtype!r}: JAX makes float64 float32 unless its 64-bit "
            "mode is on; set JAX_ENABLE_X64=1 or call jax.config.update('jax_enable_x64', True) first."
        )
    return MODEL_CLASSES[type(config)](config, rngs=rngs)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    rngs: RngsLike,
    fast: bool = False,
    **options: Any,
) -> Any:
    """Build the model called `name` with fresh parameters.

    Args:
        name: One of `list_models()`.
        num_classes: Classes of a classifier's head, by default 1000; 0 for no head.
        rngs: Source of the parameters' randomness: a seed, a JAX key, or `nnx.Rngs`.
        fast: Compute and store activations and the residual stream in bfloat16, and compile every block.
            Parameters, sums, states, norms and logits stay float32. `docs/models.md` says how much outputs and
            gradients then differ from the exact default. `options` take precedence.
        **options: Fields of the model's config to change; timm's `in_chans`, `img_size`, `drop_path_rate` and
            `global_pool` are understood. A masked autoencoder (`mae_...`) also takes its encoder's fields.

    Raises:
        UserError: the name or an option is unknown (the message suggests the nearest), or a value is impossible.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    return build_model(model_config(name, fast=fast, **options), rngs=rngs)

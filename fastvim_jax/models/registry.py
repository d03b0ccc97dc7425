"""Models by name."""

from __future__ import annotations

import fnmatch
from typing import Any

from flax import nnx

from fastvim_jax.errors import UserError, suggest
from fastvim_jax.models.channel_mamba import ChannelMamba, ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViT, ChannelViTConfig
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig, replace_options
from fastvim_jax.models.detection import CascadeRCNN, DetectorConfig
from fastvim_jax.models.mae import MaskedAutoencoder
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig, replace_masked_options
from fastvim_jax.models.presets import PRESETS, AnyModelConfig
from fastvim_jax.models.upernet import UperNet, UperNetConfig
from fastvim_jax.models.vision_mamba import VisionMamba
from fastvim_jax.models.vit import VisionTransformer

MODEL_CLASSES: dict[type, type] = {
    VisionMambaConfig: VisionMamba,
    ViTConfig: VisionTransformer,
    MaskedAutoencoderConfig: MaskedAutoencoder,
    ChannelMambaConfig: ChannelMamba,
    ChannelViTConfig: ChannelViT,
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell-style `pattern` (or contain it, if it has no wildcard)."""
    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in PRESETS if fnmatch.fnmatchcase(name, wanted)]


def model_config(name: str, **options: Any) -> Any:
    """Return the configuration of the model called `name`, with `options` (fields of its config class) replaced.

    Raises:
        UserError: unknown name or option (nearest names suggested), or an impossible value.
    """
    if name not in PRESETS:
        raise UserError(
            f"unknown model {name!r}.{suggest(name, PRESETS)} `fastvim models` lists all names."
        )
    config = PRESETS[name]
    if isinstance(config, MaskedAutoencoderConfig):
        return replace_masked_options(config, **options)
    return replace_options(config, **options)


def config_class(name: str) -> type:
    """Return the class of model configs called `name`.

    Raises:
        UserError: there is none (nearest names suggested).
    """
    known = {each.__name__: each for each in (*MODEL_CLASSES, UperNetConfig, DetectorConfig)}
    if name not in known:
        raise UserError(
            f"no model has a config of class {name!r}.{suggest(name, known)} Known are {', '.join(known)}."
        )
    return known[name]


def build_model(config: AnyModelConfig | UperNetConfig | DetectorConfig, *, rngs: nnx.Rngs) -> Any:
    """Build a freshly initialised model from its configuration."""
    if isinstance(config, UperNetConfig):
        return UperNet(config, backbone=build_model(config.backbone, rngs=rngs), rngs=rngs)
    if isinstance(config, DetectorConfig):
        return CascadeRCNN(config, build_model(config.backbone, rngs=rngs), rngs=rngs)
    return MODEL_CLASSES[type(config)](config, rngs=rngs)


def create_model(
    name: str, *, num_classes: int | None = None, rngs: nnx.Rngs, **options: Any
) -> Any:
    """Build the model called `name` with fresh parameters.

    Args:
        name: One of `list_models()`.
        num_classes: Classes of a classifier's head (1000 unless given); 0 for none.
        rngs: Source of the parameters' randomness, for example `nnx.Rngs(0)`.
        **options: Fields of the model's config to change. A masked autoencoder (`mae_...`) takes its encoder's fields
            as well.

    Raises:
        UserError: unknown name or option (nearest names suggested), or an impossible value.
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    return build_model(model_config(name, **options), rngs=rngs)

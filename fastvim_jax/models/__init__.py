"""Backbones, their configurations, and models by name.

Read in this order: `config` (every option), `vision_mamba` (the model: blocks, embedding, pooling), `backbone` (what
all models share, and the calls people make), `stack` (how stacked blocks run), `parameters` (stacked leaves by name),
`registry` and `presets` (models by name). The others are further models on the same base.
"""

from fastvim_jax.models.backbone import Backbone
from fastvim_jax.models.config import ModelConfig, VisionMambaConfig, ViTConfig
from fastvim_jax.models.detection import CascadeRCNN, DetectorConfig, cascade_mask_rcnn
from fastvim_jax.models.mae import MaskedAutoencoder
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig
from fastvim_jax.models.parameters import named_parameters, replace_parameters
from fastvim_jax.models.presets import AnyModelConfig
from fastvim_jax.models.registry import build_model, create_model, list_models, model_config
from fastvim_jax.models.upernet import UperNet, UperNetConfig, upernet
from fastvim_jax.models.vision_mamba import VisionMamba
from fastvim_jax.models.vit import VisionTransformer

__all__ = [
    "AnyModelConfig",
    "Backbone",
    "CascadeRCNN",
    "DetectorConfig",
    "MaskedAutoencoder",
    "MaskedAutoencoderConfig",
    "ModelConfig",
    "UperNet",
    "UperNetConfig",
    "ViTConfig",
    "VisionMamba",
    "VisionMambaConfig",
    "VisionTransformer",
    "build_model",
    "cascade_mask_rcnn",
    "create_model",
    "list_models",
    "model_config",
    "named_parameters",
    "replace_parameters",
    "upernet",
]

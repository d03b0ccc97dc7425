"""Build backbones and models from configurations, or by name.

Read the files in this order:

    1. config        every option of a backbone, checked before any compute
    2. vision_mamba  FastVim and Vim: patch embedding, blocks, pooling of each block
    3. layers.mixer  what a block computes (in the package `fastvim_jax.layers`; then `layers.pooling`)
    4. backbone      what all models share: embed, run the blocks, pool, classify; the public methods
    5. stack         run blocks whose parameters are stacked along `depth`
    6. parameters    names of single parameters inside the stacked ones
    7. presets, registry, names, rngs  models by name; option names known from timm; seeds
    8. pretrained    save and load a model, also from the Hugging Face hub

Then the other models, in any order: `vit` (DeiT), `channels`, `channel_mamba` and `channel_vit` (images of many
channels), `mae_config` and `mae` (masked autoencoders), `upernet` with `segmentation` (segmentation), `detection`
(Cascade Mask R-CNN). `prepared` cuts any forward pass into the work on weights alone and the rest.
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

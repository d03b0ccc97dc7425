"""DeiT-S on ImageNet-1k at 224 px, not distilled: 79.8 % top-1 (Touvron et al. 2021), 22,050,664 parameters.

DeiT's base learning rate of 5e-4 and drop path of 0.1; the rest is the recipe of fastvim_tiny.py, that is without
DeiT's repeated augmentation. Cost: 1.1e19 FLOPs (6 × 4.60 GMACs per image); time not measured.

    fastvim train imagenet/deit_small
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 22_050_664}

base = load_experiment("imagenet/fastvim_tiny")
config = replace(
    base,
    model=model_config("vit_small_patch16_224", drop_path=0.1, dtype="bfloat16", blocks="unroll"),
    optimizer=replace(base.optimizer, learning_rate=5e-4),
)

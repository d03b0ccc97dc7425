"""ViT-S on ImageNet-1k at 224 px: 80.1 % top-1 (Table 7), 22,050,664 parameters.

The recipe of fastvim_small.py (deit_small.py is the same model with DeiT's settings). Cost: 1.1e19 FLOPs (6 × 4.60
GMACs per image); time not measured.

    fastvim train imagenet/vit_small
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 22_050_664}

base = load_experiment("imagenet/fastvim_small")
config = replace(
    base,
    model=model_config("vit_small_patch16_224", drop_path=0.05, dtype="bfloat16", blocks="unroll"),
)

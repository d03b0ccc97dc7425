"""ViT-B (the original masked autoencoder), masked pre-training on ImageNet-1k with the recipe of base_pretrain.py.

111,655,680 parameters. Cost: 1.2e20 FLOPs (6 × 9.69 GMACs per image); time not measured.

    fastvim train mae/vit_base_pretrain
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 0, "parameters": 111_655_680}

model = model_config("mae_vit_base_patch16_224", dtype="bfloat16")
config = replace(load_experiment("mae/base_pretrain"), model=model)

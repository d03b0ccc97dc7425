"""FastMaskVim-H, masked pre-training on ImageNet-1k with the recipe of base_pretrain.py.

705,358,412 parameters. Cost: 5.3e20 FLOPs (6 × 43.36 GMACs per image); time not measured.

    fastvim train mae/huge_pretrain
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 0, "parameters": 705_358_412}

model = model_config("mae_fastvim_huge_patch14_224", dtype="bfloat16", activations="compute")
config = replace(load_experiment("mae/base_pretrain"), model=model)

"""Vim-B, masked pre-training on ImageNet-1k with the recipe of base_pretrain.py.

101,178,880 parameters. Cost: 7.6e19 FLOPs (6 × 6.21 GMACs per image); time not measured.

    fastvim train mae/vim_base_pretrain
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 0, "parameters": 101_178_880}

model = model_config("mae_vim_base_patch16_224", dtype="bfloat16", activations="compute")
config = replace(load_experiment("mae/base_pretrain"), model=model)

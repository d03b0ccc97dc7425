"""Vim-L, masked pre-training on ImageNet-1k with the recipe of base_pretrain.py.

343,562,496 parameters. Cost: 2.3e20 FLOPs (6 × 19.10 GMACs per image); time not measured.

    fastvim train mae/vim_large_pretrain
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 0, "parameters": 343_562_496}

model = model_config("mae_vim_large_patch16_224", dtype="bfloat16", activations="compute")
config = replace(load_experiment("mae/base_pretrain"), model=model)

"""Vim-B fine-tuned from mae/vim_base_pretrain at 224 px: 83.3 % top-1 in the paper, FastVim-B 83.0.

The recipe of base_finetune.py. 97,672,168 parameters. Cost: 1.6e19 FLOPs (6 × 20.87 GMACs per image); time not
measured.

    fastvim train mae/vim_base_finetune
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 97_672_168}

base = load_experiment("mae/base_finetune")
options = {"drop_path": 0.3, "dtype": base.model.dtype, "activations": base.model.activations}
config = replace(
    base,
    init="runs/mae/vim_base_pretrain",
    model=model_config("vim_base_patch16_224", **options),
)

"""Vim-L fine-tuned from mae/vim_large_pretrain at 224 px: 85.1 % top-1 in the paper, FastVim-L 84.9.

The recipe of large_finetune.py. 340,231,144 parameters. Cost: 2.8e19 FLOPs (6 × 71.62 GMACs per image); time not
measured.

    fastvim train mae/vim_large_finetune
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 340_231_144}

base = load_experiment("mae/large_finetune")
options = {"drop_path": 0.3, "dtype": base.model.dtype, "activations": base.model.activations}
config = replace(
    base,
    init="runs/mae/vim_large_pretrain",
    model=model_config("vim_large_patch16_224", **options),
)

"""Vim-B on ImageNet-1k at 224 px with a LayerNorm between scan and gate: 82.6 % top-1, 97,672,168 parameters.

The recipe of fastvim_base.py. Cost: 4.8e19 FLOPs (6 × 20.87 GMACs per image); time not measured.

    fastvim train imagenet/vim_base_post_norm
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 97_672_168}

base = load_experiment("imagenet/vim_base")
config = replace(base, model=replace(base.model, post_norm="layer"))

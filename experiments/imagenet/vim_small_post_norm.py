"""Vim-S on ImageNet-1k at 224 px with a LayerNorm between scan and gate: 25,833,448 parameters.

No result of the paper is known at this size; without the norm it is 80.5 % (vim_small.py). The recipe is that of
fastvim_small.py. Cost: 1.4e19 FLOPs (6 × 5.90 GMACs per image); time not measured.

    fastvim train imagenet/vim_small_post_norm
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_833_448}

base = load_experiment("imagenet/vim_small")
config = replace(base, model=replace(base.model, post_norm="layer"))

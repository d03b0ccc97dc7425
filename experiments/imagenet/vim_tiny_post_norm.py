"""Vim-T on ImageNet-1k at 224 px with a LayerNorm between scan and gate: 7,166,440 parameters.

No result of the paper is known at this size; without the norm it is 76.1 % (vim_tiny.py). The recipe is that of
fastvim_tiny.py. Cost: 4.2e18 FLOPs (6 × 1.82 GMACs per image); time not measured.

    fastvim train imagenet/vim_tiny_post_norm
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 7_166_440}

base = load_experiment("imagenet/vim_tiny")
config = replace(base, model=replace(base.model, post_norm="layer"))

"""Vim-T on ImageNet-1k at 224 px, with no norm between scan and gate: 76.1 % top-1 (Table 1), 7,148,008 parameters.

It scans all 197 tokens, with the class token in the middle. The recipe is that of fastvim_tiny.py. Cost: 4.2e18 FLOPs
(6 × 1.82 GMACs per image); time not measured.

    fastvim train imagenet/vim_tiny
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 7_148_008}

base = load_experiment("imagenet/fastvim_tiny")
config = replace(
    base, model=replace(base.model, pooling="none", class_token="middle", post_norm="none")
)

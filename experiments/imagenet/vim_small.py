"""Vim-S on ImageNet-1k at 224 px, with no norm between scan and gate: 80.5 % top-1 (Table 1), 25,796,584 parameters.

It scans all 197 tokens, with the class token in the middle. The recipe is that of fastvim_small.py. Cost: 1.4e19 FLOPs
(6 × 5.90 GMACs per image); time not measured.

    fastvim train imagenet/vim_small
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_796_584}

base = load_experiment("imagenet/fastvim_small")
config = replace(
    base, model=replace(base.model, pooling="none", class_token="middle", post_norm="none")
)

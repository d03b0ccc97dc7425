"""Vim-B on ImageNet-1k at 224 px, with no norm between scan and gate: 80.7 % top-1 (Table 1), 97,598,440 parameters.

It scans all 197 tokens, with the class token in the middle. The recipe is that of fastvim_base.py. Cost: 4.8e19 FLOPs
(6 × 20.87 GMACs per image); time not measured.

    fastvim train imagenet/vim_base
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 97_598_440}

base = load_experiment("imagenet/fastvim_base")
config = replace(
    base, model=replace(base.model, pooling="none", class_token="middle", post_norm="none")
)

"""FastVim-S on ImageNet-1k at 224 px: 81.1 % top-1 (Table 1), 25,832,680 parameters.

The recipe of fastvim_tiny.py. Cost: 1.0e19 FLOPs (6 × 4.37 GMACs per image). On one H100 a step of batch 128 takes 23.0
ms (5,575 images/s, docs/scaling.md), so the steps alone are about 19 hours there.

    fastvim train imagenet/fastvim_small
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_832_680}

base = load_experiment("imagenet/fastvim_tiny")
config = replace(base, model=replace(base.model, embed_dim=384))

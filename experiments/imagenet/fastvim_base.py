"""FastVim-B on ImageNet-1k at 224 px: 82.6 % top-1 (Table 1), 97,670,632 parameters.

The recipe of fastvim_tiny.py. Drop path 0.4. Cost: 3.9e19 FLOPs (6 × 17.12 GMACs per image); time not measured.

    fastvim train imagenet/fastvim_base
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 97_670_632}

base = load_experiment("imagenet/fastvim_tiny")
config = replace(base, model=replace(base.model, embed_dim=768, drop_path=0.4))

"""ViT-S with attention over means of rows, in odd blocks of columns: 73.9 % top-1 (Table 7), 22,050,664 parameters.

Its base, vit_small.py, attends to every token: 80.1 %. Cost: 7.6e18 FLOPs (6 × 3.28 GMACs per image); time not
measured.

    fastvim train imagenet/vit_small_pooled
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 22_050_664}

base = load_experiment("imagenet/vit_small")
config = replace(base, model=replace(base.model, pooling="mean"))

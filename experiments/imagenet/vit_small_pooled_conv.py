"""The pooled ViT-S with a depthwise convolution before the pooling: 74.0 % top-1 (Table 7), 22,073,704 parameters.

Its base, vit_small_pooled.py, has none: 73.9 %. Cost: 7.6e18 FLOPs (6 × 3.28 GMACs per image); time not measured.

    fastvim train imagenet/vit_small_pooled_conv
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 22_073_704}

base = load_experiment("imagenet/vit_small_pooled")
config = replace(base, model=replace(base.model, conv_width=4))

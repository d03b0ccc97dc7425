"""The pooled ViT of `vit_pooled.py` with a depthwise convolution before the pooling (as Table 7).

fastvim train cifar10/vit_pooled_conv
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_590_986}

base = load_experiment("cifar10/vit_pooled")
config = replace(base, model=replace(base.model, conv_width=4))

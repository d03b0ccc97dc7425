"""FastVim on CIFAR-10 without the depthwise convolution before the scan (as Table 7).

Seen: 87.09 % (1 seed).

    fastvim train cifar10/no_conv
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_371_530}

base = load_experiment("cifar10/fastvim")
config = replace(base, model=replace(base.model, conv_width=0))

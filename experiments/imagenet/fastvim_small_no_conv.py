"""FastVim-S without the depthwise convolution before the scan: 78.4 % top-1 (Table 7), 25,648,360 parameters.

Its base, fastvim_small.py, has the convolution: 81.1 %. The SiLU after it stays. Cost: 1.0e19 FLOPs (6 × 4.34 GMACs per
image); time not measured.

    fastvim train imagenet/fastvim_small_no_conv
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_648_360}

base = load_experiment("imagenet/fastvim_small")
config = replace(base, model=replace(base.model, conv_width=0))

"""FastChannelVim-S/16 pooling two axes, maxima: 73.5 % top-1 on JUMP-CP (Table 21).

Its base is fastchannelvim_small_16.py.
25,316,129 parameters. Cost: 203 GFLOPs per image and epoch (6 × 33.84 GMACs); time not measured.

    fastvim train jumpcp/fastchannelvim_small_16_two_axes_max
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_316_129}

base = load_experiment("jumpcp/fastchannelvim_small_16")
config = replace(base, model=replace(base.model, pool_axes="two_axes", pooling="max"))

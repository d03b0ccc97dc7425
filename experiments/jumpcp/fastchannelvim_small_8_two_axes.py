"""FastChannelVim-S/8 pooling two axes, means: 78.4 % top-1 on JUMP-CP (Table 21).

Its base is fastchannelvim_small_8.py.
25,468,193 parameters. Cost: 808 GFLOPs per image and epoch (6 × 134.66 GMACs); time not measured.

    fastvim train jumpcp/fastchannelvim_small_8_two_axes
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_468_193}

base = load_experiment("jumpcp/fastchannelvim_small_8")
config = replace(base, model=replace(base.model, pool_axes="two_axes"))

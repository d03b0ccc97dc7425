"""FastChannelVim-S/8 with maxima pooled: 85.0 % top-1 on JUMP-CP (Table 20).

Its base is fastchannelvim_small_8.py.
25,468,193 parameters. Cost: 818 GFLOPs per image and epoch (6 × 136.34 GMACs); time not measured.

    fastvim train jumpcp/fastchannelvim_small_8_max
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_468_193}

base = load_experiment("jumpcp/fastchannelvim_small_8")
config = replace(base, model=replace(base.model, pooling="max"))

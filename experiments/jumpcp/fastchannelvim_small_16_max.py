"""FastChannelVim-S/16 with maxima pooled: 72.9 % top-1 on JUMP-CP (Table 20).

Its base is fastchannelvim_small_16.py.
25,316,129 parameters. Cost: 208 GFLOPs per image and epoch (6 × 34.66 GMACs); time not measured.

    fastvim train jumpcp/fastchannelvim_small_16_max
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_316_129}

base = load_experiment("jumpcp/fastchannelvim_small_16")
config = replace(base, model=replace(base.model, pooling="max"))

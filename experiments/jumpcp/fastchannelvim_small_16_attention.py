"""FastChannelVim-S/16 with attention pooling: 73.1 % top-1 on JUMP-CP (Table 20).

Its base is fastchannelvim_small_16.py.
25,353,041 parameters. Cost: 208 GFLOPs per image and epoch (6 × 34.72 GMACs); time not measured.

    fastvim train jumpcp/fastchannelvim_small_16_attention
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_353_041}

base = load_experiment("jumpcp/fastchannelvim_small_16")
config = replace(base, model=replace(base.model, pooling="attention"))

"""FastChannelVim-S/8 with attention pooling: 85.8 % top-1 on JUMP-CP (Table 20).

Its base is fastchannelvim_small_8.py.
25,505,105 parameters. Cost: 819 GFLOPs per image and epoch (6 × 136.57 GMACs); time not measured.

    fastvim train jumpcp/fastchannelvim_small_8_attention
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_505_105}

base = load_experiment("jumpcp/fastchannelvim_small_8")
config = replace(base, model=replace(base.model, pooling="attention"))

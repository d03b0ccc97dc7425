"""Vim-S/8, patches of all 8 channels: 66.4 % top-1 on JUMP-CP (Table 3).

Its base is fastchannelvim_small_8.py.
25,637,921 parameters. Cost: 141 GFLOPs per image and epoch (6 × 23.45 GMACs); time not measured.

    fastvim train jumpcp/vim_small_8
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_637_921}

base = load_experiment("jumpcp/fastchannelvim_small_8")
config = replace(
    base,
    model=model_config(
        "vim_small_patch16_224",
        num_classes=161,
        channels=8,
        patch_size=8,
        drop_path=0.05,
        dtype="bfloat16",
        activations="compute",
    ),
    data=replace(base.data, channel_sampling="none"),
)

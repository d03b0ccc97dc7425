"""FastChannelVim-S/8: 83.1 % top-1 on JUMP-CP (Table 3).

Its base is fastchannelvim_small_16.py.
25,468,193 parameters. Cost: 818 GFLOPs per image and epoch (6 × 136.34 GMACs); time not measured.

    fastvim train jumpcp/fastchannelvim_small_8
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_468_193}

base = load_experiment("jumpcp/fastchannelvim_small_16")
config = replace(
    base,
    model=model_config(
        "fastchannelvim_small_patch8_224",
        num_classes=161,
        drop_path=0.05,
        dtype="bfloat16",
        activations="compute",
    ),
)

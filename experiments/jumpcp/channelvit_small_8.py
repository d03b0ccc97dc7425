"""ChannelViT-S/8, attention over all tokens: 74.8 % top-1 on JUMP-CP (Table 3).

Its base is fastchannelvim_small_8.py.
21,686,177 parameters. Cost: 2976 GFLOPs per image and epoch (6 × 496.01 GMACs); time not measured.

    fastvim train jumpcp/channelvit_small_8
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 21_686_177}

base = load_experiment("jumpcp/fastchannelvim_small_8")
config = replace(
    base,
    model=model_config(
        "channelvit_small_patch8_224", num_classes=161, drop_path=0.05, dtype="bfloat16"
    ),
)

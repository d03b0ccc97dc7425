"""ChannelViT-S/16, attention over all tokens: 68.6 % top-1 on JUMP-CP (Table 3).

Its base is fastchannelvim_small_16.py.
21,534,113 parameters. Cost: 337 GFLOPs per image and epoch (6 × 56.16 GMACs); time not measured.

    fastvim train jumpcp/channelvit_small_16
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 21_534_113}

base = load_experiment("jumpcp/fastchannelvim_small_16")
config = replace(
    base,
    model=model_config(
        "channelvit_small_patch16_224", num_classes=161, drop_path=0.05, dtype="bfloat16"
    ),
)

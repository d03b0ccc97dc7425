"""ChannelVim-S/16, which pools nothing: 73.5 % top-1 on JUMP-CP (Table 3).

Its base is fastchannelvim_small_16.py.
25,316,513 parameters. Cost: 280 GFLOPs per image and epoch (6 × 46.72 GMACs); time not measured.

    fastvim train jumpcp/channelvim_small_16
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_316_513}

base = load_experiment("jumpcp/fastchannelvim_small_16")
config = replace(
    base,
    model=model_config(
        "channelvim_small_patch16_224",
        num_classes=161,
        drop_path=0.05,
        dtype="bfloat16",
        activations="compute",
    ),
)

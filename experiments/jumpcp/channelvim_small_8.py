"""ChannelVim-S/8, which pools nothing: 83.0 % top-1 on JUMP-CP (Table 3).

Its base is fastchannelvim_small_8.py.
25,468,577 parameters. Cost: 1118 GFLOPs per image and epoch (6 × 186.31 GMACs); time not measured.

    fastvim train jumpcp/channelvim_small_8
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 25_468_577}

base = load_experiment("jumpcp/fastchannelvim_small_8")
config = replace(
    base,
    model=model_config(
        "channelvim_small_patch8_224",
        num_classes=161,
        drop_path=0.05,
        dtype="bfloat16",
        activations="compute",
    ),
)

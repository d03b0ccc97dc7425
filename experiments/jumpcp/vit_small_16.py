"""ViT-S/16, patches of all 8 channels: 58.9 % top-1 on JUMP-CP (Table 3).

Its base is fastchannelvim_small_16.py.
22,219,169 parameters. Cost: 28 GFLOPs per image and epoch (6 × 4.69 GMACs); time not measured.

    fastvim train jumpcp/vit_small_16
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 22_219_169}

base = load_experiment("jumpcp/fastchannelvim_small_16")
config = replace(
    base,
    model=model_config(
        "vit_small_patch16_224",
        num_classes=161,
        channels=8,
        patch_size=16,
        drop_path=0.05,
        dtype="bfloat16",
    ),
    data=replace(base.data, channel_sampling="none"),
)

"""ViT-S/8, patches of all 8 channels: 67.6 % top-1 on JUMP-CP (Table 3).

Its base is fastchannelvim_small_8.py.
21,855,137 parameters. Cost: 135 GFLOPs per image and epoch (6 × 22.50 GMACs); time not measured.

    fastvim train jumpcp/vit_small_8
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 161, "parameters": 21_855_137}

base = load_experiment("jumpcp/fastchannelvim_small_8")
config = replace(
    base,
    model=model_config(
        "vit_small_patch16_224",
        num_classes=161,
        channels=8,
        patch_size=8,
        drop_path=0.05,
        dtype="bfloat16",
    ),
    data=replace(base.data, channel_sampling="none"),
)

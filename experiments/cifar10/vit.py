"""A ViT on CIFAR-10 with about as many parameters as `fastvim.py`: 8 blocks, 192 wide, 3 heads.

All else is as there except for the learning rate: at FastVim's 4e-3 this model does not train (its attention
collapses).

    fastvim train cifar10/vit
"""

from dataclasses import replace

from fastvim_jax.models import ViTConfig
from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_583_306}

base = load_experiment("cifar10/fastvim")
config = replace(
    base,
    model=ViTConfig(
        image_size=32,
        patch_size=4,
        num_classes=10,
        embed_dim=192,
        depth=8,
        num_heads=3,
        drop_path=0.05,
        dtype="bfloat16",
        blocks="unroll",
    ),
    optimizer=replace(base.optimizer, learning_rate=1e-3),
)

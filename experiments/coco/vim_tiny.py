"""Vim-T with Cascade Mask R-CNN on COCO, beside fastvim_tiny.py: no result is recorded,
66,341,154 parameters.

The recipe of fastvim_tiny.py with every token scanned. Cost: not measured.

    fastvim train coco/vim_tiny --init runs/imagenet/vim_tiny
"""

from dataclasses import replace

from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 80, "parameters": 66_341_154}

base = load_experiment("coco/fastvim_tiny")
config = replace(
    base,
    model=cascade_mask_rcnn(
        model_config(
            "vim_tiny_patch16_224",
            image_size=1024,
            drop_path=0.1,
            dtype="bfloat16",
            activations="compute",
            post_norm="none",
            blocks="unroll",
        ),
    ),
)

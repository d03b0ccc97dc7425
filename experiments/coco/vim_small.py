"""Vim-S with Cascade Mask R-CNN on COCO, beside fastvim_small.py: no result is recorded,
86,179,986 parameters.

The recipe of fastvim_tiny.py with every token scanned. Cost: not measured.

    fastvim train coco/vim_small --init runs/imagenet/vim_small
"""

from dataclasses import replace

from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 80, "parameters": 86_179_986}

base = load_experiment("coco/fastvim_tiny")
config = replace(
    base,
    model=cascade_mask_rcnn(
        model_config(
            "vim_small_patch16_224",
            image_size=1024,
            drop_path=0.1,
            dtype="bfloat16",
            activations="compute",
            post_norm="none",
            blocks="unroll",
        ),
    ),
)

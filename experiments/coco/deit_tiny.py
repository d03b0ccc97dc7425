"""DeiT-T with Cascade Mask R-CNN on COCO, beside fastvim_tiny.py: no result is recorded,
64,910,370 parameters.

The recipe of fastvim_tiny.py. Cost: not measured.

    fastvim train coco/deit_tiny --init runs/imagenet/deit_tiny
"""

from dataclasses import replace

from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 80, "parameters": 64_910_370}

base = load_experiment("coco/fastvim_tiny")
config = replace(
    base,
    model=cascade_mask_rcnn(
        model_config(
            "vit_tiny_patch16_224",
            image_size=1024,
            drop_path=0.1,
            dtype="bfloat16",
            blocks="unroll",
        ),
    ),
)

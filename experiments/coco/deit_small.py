"""DeiT-S with Cascade Mask R-CNN on COCO, beside fastvim_small.py: no result is recorded,
82,433,682 parameters.

The recipe of fastvim_tiny.py. Cost: not measured.

    fastvim train coco/deit_small --init runs/imagenet/deit_small
"""

from dataclasses import replace

from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 80, "parameters": 82_433_682}

base = load_experiment("coco/fastvim_tiny")
config = replace(
    base,
    model=cascade_mask_rcnn(
        model_config(
            "vit_small_patch16_224",
            image_size=1024,
            drop_path=0.1,
            dtype="bfloat16",
            blocks="unroll",
        ),
    ),
)

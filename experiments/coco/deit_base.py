"""DeiT-B with Cascade Mask R-CNN on COCO, beside fastvim_base.py: no result is recorded,
150,326,130 parameters.

The recipe of fastvim_tiny.py. Cost: not measured.

    fastvim train coco/deit_base --init runs/imagenet/deit_base
"""

from dataclasses import replace

from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 80, "parameters": 150_326_130}

base = load_experiment("coco/fastvim_tiny")
config = replace(
    base,
    model=cascade_mask_rcnn(
        model_config(
            "vit_base_patch16_224",
            image_size=1024,
            drop_path=0.4,
            dtype="bfloat16",
            blocks="unroll",
        ),
    ),
)

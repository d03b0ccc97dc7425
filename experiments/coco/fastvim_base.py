"""FastVim-B with Cascade Mask R-CNN on COCO: box AP 50.0, mask AP 43.2 in the paper (section 4.6),
161,429,874 parameters.

The recipe of fastvim_tiny.py, with drop path 0.4. Cost: not measured.

    fastvim train coco/fastvim_base --init runs/imagenet/fastvim_base
"""

from dataclasses import replace

from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 80, "parameters": 161_429_874}

base = load_experiment("coco/fastvim_tiny")
config = replace(
    base,
    model=cascade_mask_rcnn(
        model_config(
            "fastvim_base_patch16_224",
            image_size=1024,
            drop_path=0.4,
            dtype="bfloat16",
            activations="compute",
            blocks="unroll",
        ),
    ),
)

"""FastVim-S with Cascade Mask R-CNN on COCO: box AP 48.4, mask AP 41.8 in the paper (section 4.6),
86,216,082 parameters.

The recipe of fastvim_tiny.py. Cost: not measured.

    fastvim train coco/fastvim_small --init runs/imagenet/fastvim_small
"""

from dataclasses import replace

from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 80, "parameters": 86_216_082}

base = load_experiment("coco/fastvim_tiny")
config = replace(
    base,
    model=cascade_mask_rcnn(
        model_config(
            "fastvim_small_patch16_224",
            image_size=1024,
            drop_path=0.1,
            dtype="bfloat16",
            activations="compute",
            blocks="unroll",
        ),
    ),
)

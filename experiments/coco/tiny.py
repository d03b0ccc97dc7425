"""FastVim-T with Cascade Mask R-CNN memorises 24 real COCO images, from random weights: minutes on one GPU.

It shows that the whole path works (JSON, polygons, crowds, training, detection, masks, average precision, pictures). It
shows nothing about generalisation: it is evaluated on its training images, without augmentation. 66,359,202 parameters.

The anchors are smaller than the recipe's, and each object gets its best anchors down to an IoU of 0.1. Otherwise a
tenth of these objects would get none, because they are so small that none reaches the recipe's threshold of 0.3.

A run takes 900 steps, three batches per epoch. The aim is a box AP of 0.9 on these images (benchmarks/dense.md). Before
its rate falls, at epochs 210 and 270, a run is at about 0.87. Compiled for an H100, a step takes 34 GB.

Set FASTVIM_DATA_DIR to the folder that holds `coco_tiny` with `annotations`, `train2017` and `val2017`.

    fastvim train coco/tiny
"""

from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.models.detection import ProposalConfig
from fastvim_jax.training import OptimizerConfig
from fastvim_jax.training.detection.config import DetectionConfig

claims = {"classes": 80, "parameters": 66_359_202}

config = DetectionConfig(
    model=cascade_mask_rcnn(
        model_config(
            "fastvim_tiny_patch16_224",
            image_size=1024,
            dtype="bfloat16",
            activations="compute",
            blocks="scan",
        ),
        rpn=ProposalConfig(scale=6.0, negative=0.1, train_before=500, train_after=500),
        samples=128,
    ),
    data=DetectionData(
        path="$FASTVIM_DATA_DIR/coco_tiny",
        eval_split="train2017",
        scale=(1.0, 1.0),
        flip=0.0,
        batch_size=8,
        max_objects=32,  # the fullest image has 23
        workers=12,  # most of the host's time goes into drawing masks at 1024 px
    ),
    optimizer=OptimizerConfig(
        learning_rate=3e-4,
        learning_rate_scaling="none",
        schedule="warmup_step",
        warmup_epochs=20.0,
        warmup_start=1e-6,
        milestones=(0.7, 0.9),
        weight_decay=0.0,
        clip_grad_norm=10.0,
    ),
    epochs=300,
    evaluate_every_epochs=0,
    checkpoint_every_steps=10**6,
    log_every_steps=20,
    pictures=8,
)

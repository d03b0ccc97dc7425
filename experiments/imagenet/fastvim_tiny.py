"""FastVim-T on ImageNet-1k at 224 px, the paper's supervised recipe: 75.4 % top-1 (Table 1), 7,166,056 parameters.

The recipe of every file in this folder: 300 epochs of 1,281,167 images at a batch of 1024; random resized crop, flip,
RandAugment, random erasing, mixup and cutmix, label smoothing; AdamW. Both the raw weights and their average are
evaluated.

Cost: 2.6e18 FLOPs (6 × 1.14 GMACs per image). On one H100 a step of batch 128 of this model takes 11.2 ms (11,393
images/s, docs/scaling.md), so the steps alone are about 9 hours there, at that batch and without augmentation.
FLOPs, here and in the other files, count the matrix products of all epochs. A multiply-add (MAC) is 2 FLOPs, and the
backward pass takes twice as many as the forward pass, hence the factor 6.

Set FASTVIM_IMAGENET_DIR to a folder with `train` and `val`, each with one sub-folder per class.

    fastvim train imagenet/fastvim_tiny
"""

from fastvim_jax.data import ClassificationData
from fastvim_jax.models import model_config
from fastvim_jax.training import OptimizerConfig, TrainConfig

claims = {"classes": 1000, "parameters": 7_166_056}

config = TrainConfig(
    model=model_config(
        "fastvim_tiny_patch16_224",
        drop_path=0.05,
        dtype="bfloat16",
        activations="compute",
        blocks="unroll",
    ),
    data=ClassificationData(
        source="image_folder",
        path="$FASTVIM_IMAGENET_DIR",
        eval_split="val",
        image_size=224,
        batch_size=1024,
        workers=16,
        crop="random_resized",
        flip=0.5,
        rand_augment=9.0,
        random_erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
        eval_crop=0.875,
    ),
    optimizer=OptimizerConfig(
        learning_rate=1e-3,
        learning_rate_scaling="deit",
        warmup_epochs=5.0,
        warmup_start=1e-6,
        final_learning_rate=1e-5,
        weight_decay=0.05,
        decay_groups="supervised",
    ),
    epochs=300,
    label_smoothing=0.1,
    ema_decay=0.9999,
)

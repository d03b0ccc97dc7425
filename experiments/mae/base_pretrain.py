"""FastMaskVim-B, masked pre-training on ImageNet-1k: 1600 epochs, batch 4096, mask ratio 0.75, norm-pixel loss.

Section 4.3 of the paper; fine-tuned by base_finetune.py. 101,178,112 parameters. Cost: 6.6e19 FLOPs (6 × 5.40 GMACs
per image); time not measured. Set FASTVIM_DATA_DIR to the folder that holds imagenet/train and imagenet/val.

    fastvim train mae/base_pretrain
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment
from fastvim_jax.training.masked.config import PretrainConfig

claims = {"classes": 0, "parameters": 101_178_112}

supervised = load_experiment("imagenet/fastvim_base")
model = model_config("mae_fastvim_base_patch16_224", dtype="bfloat16", activations="compute")
config = PretrainConfig(
    model=model,
    data=replace(
        supervised.data,
        batch_size=4096,
        crop_scale=(0.2, 1.0),
        rand_augment=None,
        random_erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
    ),
    epochs=1600,
    evaluate_every_epochs=20,
)

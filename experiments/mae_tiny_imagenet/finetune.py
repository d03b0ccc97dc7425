"""Fine-tuning of mae_tiny_imagenet/pretrain, as many epochs as scratch.py, with layer-wise learning rates.

fastvim train mae_tiny_imagenet/finetune
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 200, "parameters": 3_481_928}

base = load_experiment("mae_tiny_imagenet/scratch")
config = replace(
    base,
    init="runs/mae_tiny_imagenet/pretrain",
    optimizer=replace(base.optimizer, decay_groups="finetune", layer_decay=0.75),
)

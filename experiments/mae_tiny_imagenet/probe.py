"""Linear probe of mae_tiny_imagenet/pretrain.

fastvim train mae_tiny_imagenet/probe
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 200, "parameters": 3_481_928}

base = load_experiment("mae_cifar10/probe")
supervised = load_experiment("tiny_imagenet/fastvim")
config = replace(
    base,
    model=replace(supervised.model, drop_path=0.0),
    data=replace(supervised.data, batch_size=1024, cutmix=0.0, mixup=0.0, random_erasing=0.0),
    init="runs/mae_tiny_imagenet/pretrain",
    log_every_steps=9,
)

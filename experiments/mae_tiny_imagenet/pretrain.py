"""Masked pre-training on a tenth of Tiny-ImageNet, 10,000 images of 64 x 64 without labels: 12 blocks, 192 wide,
patches of 8 pixels, of whose 64 a random quarter is seen. Results and cost: benchmarks/masked.md.

    fastvim train mae_tiny_imagenet/pretrain
"""

from dataclasses import replace

from fastvim_jax.models import MaskedAutoencoderConfig
from fastvim_jax.training import load_experiment

claims = {"classes": 0, "parameters": 4_071_168}

base = load_experiment("mae_cifar10/pretrain")
supervised = load_experiment("tiny_imagenet/fastvim")
config = replace(
    base,
    model=MaskedAutoencoderConfig(
        encoder=replace(supervised.model, num_classes=0, drop_path=0.0),
        decoder_dim=192,
        decoder_depth=2,
    ),
    data=replace(supervised.data, batch_size=256, cutmix=0.0, mixup=0.0, random_erasing=0.0),
    epochs=400,
    evaluate_every_epochs=100,
    log_every_steps=195,
)

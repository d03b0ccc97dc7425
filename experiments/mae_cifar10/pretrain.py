"""Masked pre-training of a FastVim on CIFAR-10's training images, without their labels: 12 blocks, 192 wide,
patches of 4 pixels, of whose 64 a random quarter is seen.

    FASTVIM_DATA_DIR=... fastvim train mae_cifar10/pretrain

About 2 minutes on an H100; then `mae_cifar10/finetune`, or `probe`. Results: benchmarks/masked.md.
"""

from dataclasses import replace

from fastvim_jax.models import MaskedAutoencoderConfig
from fastvim_jax.training import load_experiment
from fastvim_jax.training.masked.config import PRETRAINING, PretrainConfig

claims = {"classes": 0, "parameters": 4_015_728}

supervised = load_experiment("cifar10/fastvim")
config = PretrainConfig(
    model=MaskedAutoencoderConfig(
        encoder=replace(supervised.model, num_classes=0, drop_path=0.0),
        decoder_dim=192,
        decoder_depth=2,
    ),
    data=replace(supervised.data, batch_size=512, cutmix=0.0),
    optimizer=replace(PRETRAINING, learning_rate=1e-3, learning_rate_scaling="none"),
    epochs=200,
    evaluate_every_epochs=50,
    checkpoint_every_steps=2000,
    log_every_steps=194,
)

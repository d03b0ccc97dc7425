"""FastVim trained from scratch with a tenth of the labels: the first 5,000 images (500 per class), 100 epochs.

It is the baseline of finetune_tenth.py. Before any run it was stated that pre-training must win here, with three seeds.

    fastvim train mae_cifar10/scratch_tenth
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_417_610}

base = load_experiment("mae_cifar10/scratch")
config = replace(
    base,
    data=replace(base.data, train_split="train[:5000]", batch_size=128),
    epochs=100,
    ema_decay=0.998,
    log_every_steps=39,
)

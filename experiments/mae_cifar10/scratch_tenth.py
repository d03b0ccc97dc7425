"""From scratch with a tenth of the labels: the first 5,000 training images, 500 of each class, 100 epochs.

The setting in which pre-training must win, stated before it was run: `finetune_tenth` ahead of this, with three
seeds.
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

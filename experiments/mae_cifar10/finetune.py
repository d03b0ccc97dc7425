"""Fine-tuning of mae_cifar10/pretrain with all labels: 30 epochs, layer-wise rates that fall every two blocks.

    fastvim train mae_cifar10/finetune --init runs/mae_cifar10/pretrain

model.pool_scale becomes 0.25, 1 - mask ratio. Results and cost: benchmarks/masked.md; from scratch: scratch.py.
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_417_610}

base = load_experiment("mae_cifar10/scratch")
config = replace(
    base,
    init="runs/mae_cifar10/pretrain",
    optimizer=replace(base.optimizer, decay_groups="finetune", layer_decay=0.75),
)

"""Fine-tuning of mae_cifar10/pretrain with a tenth of the labels, in the epochs of scratch_tenth.py.

With three seeds each: 74.40 % after 40 epochs of pre-training, 75.88 after 200, 68.93 from scratch:
benchmarks/masked.md.

    fastvim train mae_cifar10/finetune_tenth
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_417_610}

base = load_experiment("mae_cifar10/scratch_tenth")
config = replace(
    base,
    init="runs/mae_cifar10/pretrain",
    optimizer=replace(base.optimizer, decay_groups="finetune", layer_decay=0.75),
)

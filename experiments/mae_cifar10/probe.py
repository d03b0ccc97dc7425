"""Linear probe of mae_cifar10/pretrain: all labels, frozen backbone, features computed once.

    fastvim train mae_cifar10/probe --init runs/mae_cifar10/pretrain
    fastvim train mae_cifar10/probe --no-scale-from-init --run-dir runs/mae_cifar10/probe_unscaled

In the paper (FastVim-L, ImageNet) a probe has 60.2 % with the scaling factor and 0.02 % without it (Table 15). Here it
does not collapse: 59.4 % with it, 57.4 % without, after 40 epochs of pre-training (benchmarks/masked.md).
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment
from fastvim_jax.training.masked.config import ProbeConfig

claims = {"classes": 10, "parameters": 3_417_610}

base = load_experiment("cifar10/fastvim")
config = ProbeConfig(
    model=replace(base.model, drop_path=0.0),
    data=replace(base.data, batch_size=1024, cutmix=0.0),
    init="runs/mae_cifar10/pretrain",
    evaluate_every_epochs=0,
    checkpoint_every_steps=5000,
    log_every_steps=48,
)

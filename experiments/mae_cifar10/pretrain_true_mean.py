"""As pretrain.py, but divides a row's sum by its number of tokens (true mean, Table 12: 82.8 % against 83.0).

fastvim train mae_cifar10/pretrain_true_mean
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 0, "parameters": 4_015_728}

base = load_experiment("mae_cifar10/pretrain")
config = replace(base, model=replace(base.model, divisor="count"))

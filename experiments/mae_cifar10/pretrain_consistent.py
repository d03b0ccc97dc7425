"""As pretrain.py, but each token keeps its own row in the backward direction, as in no released model.

fastvim train mae_cifar10/pretrain_consistent
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 0, "parameters": 4_015_728}

base = load_experiment("mae_cifar10/pretrain")
config = replace(base, model=replace(base.model, reversal="consistent"))

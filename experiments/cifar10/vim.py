"""Vim on CIFAR-10: the FastVim of `fastvim.py` with a scan over all 64 tokens instead of 8 pooled ones.

Seen: 87.90 % (3 seeds).

    fastvim train cifar10/vim
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_417_610}

base = load_experiment("cifar10/fastvim")
config = replace(base, model=replace(base.model, pooling="none"))

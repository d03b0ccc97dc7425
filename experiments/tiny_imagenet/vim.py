"""Vim on a tenth of Tiny-ImageNet: the FastVim of `fastvim.py`, but its scan reads all 64 tokens, not 8 pooled ones.

fastvim train tiny_imagenet/vim
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 200, "parameters": 3_481_928}

base = load_experiment("tiny_imagenet/fastvim")
config = replace(base, model=replace(base.model, pooling="none"))

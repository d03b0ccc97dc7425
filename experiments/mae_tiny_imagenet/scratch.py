"""From scratch on a tenth of Tiny-ImageNet: tiny_imagenet/fastvim.py, 100 epochs."""

from fastvim_jax.training import load_experiment

claims = {"classes": 200, "parameters": 3_481_928}

config = load_experiment("tiny_imagenet/fastvim")

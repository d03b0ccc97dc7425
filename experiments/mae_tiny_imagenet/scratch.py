"""tiny_imagenet/fastvim.py under a second name: trained from scratch for 100 epochs, the baseline of finetune.py.

fastvim train mae_tiny_imagenet/scratch
"""

from fastvim_jax.training import load_experiment

claims = {"classes": 200, "parameters": 3_481_928}

config = load_experiment("tiny_imagenet/fastvim")

"""FastVim on a tenth of Tiny-ImageNet pooling over the rows of the grid in every block (Table 6).

fastvim train tiny_imagenet/only_rows
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 200, "parameters": 3_481_928}

base = load_experiment("tiny_imagenet/fastvim")
config = replace(base, model=replace(base.model, pool_axes="rows"))

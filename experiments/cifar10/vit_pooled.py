"""The ViT of `vit.py` with attention over the means of rows in even blocks, of columns in odd blocks (as Table 7).

fastvim train cifar10/vit_pooled
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_583_306}

base = load_experiment("cifar10/vit")
config = replace(base, model=replace(base.model, pooling="mean"))

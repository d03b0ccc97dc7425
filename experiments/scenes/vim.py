"""The Vim of cifar10/vim.py with UperNet, with all other settings of fastvim.py.

fastvim train scenes/vim
"""

from dataclasses import replace

from fastvim_jax.models import upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 11, "parameters": 5_732_502}

base = load_experiment("scenes/fastvim")
config = replace(
    base,
    model=upernet(
        load_experiment("cifar10/vim").model,
        image_size=128,
        num_classes=11,
        channels=128,
        auxiliary_channels=64,
    ),
)

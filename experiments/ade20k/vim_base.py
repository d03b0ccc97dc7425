"""Vim-B with UperNet on ADE20K, beside fastvim_base.py: no result is recorded, 131,612,204 parameters.

The recipe of fastvim_tiny.py with every token scanned. The published Vim had another recipe (a deconvolution pyramid,
60,000 steps). Cost: 2.2e+18 FLOPs (6 x 142 GMACs per image, 33 of them in the heads); time not measured.

    fastvim train ade20k/vim_base --init runs/imagenet/vim_base
"""

from dataclasses import replace

from fastvim_jax.models import model_config, upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 150, "parameters": 131_612_204}

base = load_experiment("ade20k/fastvim_tiny")
config = replace(
    base,
    model=upernet(
        model_config(
            "vim_base_patch16_224",
            drop_path=0.4,
            dtype="bfloat16",
            activations="compute",
            post_norm="none",
            blocks="unroll",
        ),
    ),
)

"""Vim-T with UperNet on ADE20K, beside fastvim_tiny.py: no result is recorded, 35,211,116 parameters.

The recipe of fastvim_tiny.py with every token scanned. The published Vim had another recipe (a deconvolution pyramid,
60,000 steps). Cost: 5.8e+17 FLOPs (6 x 38 GMACs per image, 28 of them in the heads); time not measured.

    fastvim train ade20k/vim_tiny --init runs/imagenet/vim_tiny
"""

from dataclasses import replace

from fastvim_jax.models import model_config, upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 150, "parameters": 35_211_116}

base = load_experiment("ade20k/fastvim_tiny")
config = replace(
    base,
    model=upernet(
        model_config(
            "vim_tiny_patch16_224",
            drop_path=0.05,
            dtype="bfloat16",
            activations="compute",
            post_norm="none",
            blocks="unroll",
        ),
    ),
)

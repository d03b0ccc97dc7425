"""Vim-S with UperNet on ADE20K, beside fastvim_small.py: no result is recorded, 55,843,244 parameters.

The recipe of fastvim_tiny.py with every token scanned. The published Vim had another recipe (a deconvolution pyramid,
60,000 steps). Cost: 9.4e+17 FLOPs (6 x 61 GMACs per image, 30 of them in the heads); time not measured.

    fastvim train ade20k/vim_small --init runs/imagenet/vim_small
"""

from dataclasses import replace

from fastvim_jax.models import model_config, upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 150, "parameters": 55_843_244}

base = load_experiment("ade20k/fastvim_tiny")
config = replace(
    base,
    model=upernet(
        model_config(
            "vim_small_patch16_224",
            drop_path=0.05,
            dtype="bfloat16",
            activations="compute",
            post_norm="none",
            blocks="unroll",
        ),
    ),
)

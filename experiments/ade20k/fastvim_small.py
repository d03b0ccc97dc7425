"""FastVim-S with UperNet on ADE20K: 44.9 mIoU in the paper (section 4.5), 55,879,340 parameters.

The recipe of fastvim_tiny.py. Cost: 8.1e+17 FLOPs (6 x 53 GMACs per image, 30 of them in the heads); time not measured.

    fastvim train ade20k/fastvim_small --init runs/imagenet/fastvim_small
"""

from dataclasses import replace

from fastvim_jax.models import model_config, upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 150, "parameters": 55_879_340}

base = load_experiment("ade20k/fastvim_tiny")
config = replace(
    base,
    model=upernet(
        model_config(
            "fastvim_small_patch16_224",
            drop_path=0.05,
            dtype="bfloat16",
            activations="compute",
            blocks="unroll",
        ),
    ),
)

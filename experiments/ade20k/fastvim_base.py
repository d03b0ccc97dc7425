"""FastVim-B with UperNet on ADE20K: 47.8 mIoU in the paper (section 4.5), 131,684,396 parameters.

The recipe of fastvim_tiny.py. Cost: 1.9e+18 FLOPs (6 x 122 GMACs per image, 33 of them in the heads); time not
measured.

    fastvim train ade20k/fastvim_base --init runs/imagenet/fastvim_base
"""

from dataclasses import replace

from fastvim_jax.models import model_config, upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 150, "parameters": 131_684_396}

base = load_experiment("ade20k/fastvim_tiny")
config = replace(
    base,
    model=upernet(
        model_config(
            "fastvim_base_patch16_224",
            drop_path=0.4,
            dtype="bfloat16",
            activations="compute",
            blocks="unroll",
        ),
    ),
)

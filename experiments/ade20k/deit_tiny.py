"""DeiT-T with UperNet on ADE20K, beside fastvim_tiny.py: no result is recorded, 35,256,428 parameters.

The recipe of fastvim_tiny.py, on the pyramid of a MultiLevelNeck as in the DeiT baselines.
Cost: 3.5e+18 FLOPs (6 x 230 GMACs per image, 212 of them in the heads); time not measured.

    fastvim train ade20k/deit_tiny --init runs/imagenet/deit_tiny
"""

from dataclasses import replace

from fastvim_jax.models import model_config, upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 150, "parameters": 35_256_428}

base = load_experiment("ade20k/fastvim_tiny")
config = replace(
    base,
    model=upernet(
        model_config(
            "vit_tiny_patch16_224",
            drop_path=0.1,
            dtype="bfloat16",
            blocks="unroll",
        ),
        neck="multilevel",
    ),
)

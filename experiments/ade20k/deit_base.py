"""DeiT-B with UperNet on ADE20K, beside fastvim_base.py: no result is recorded, 144,179,756 parameters.

The recipe of fastvim_tiny.py, on the pyramid of a MultiLevelNeck as in the DeiT baselines.
Cost: 6.9e+18 FLOPs (6 x 445 GMACs per image, 220 of them in the heads); time not measured.

    fastvim train ade20k/deit_base --init runs/imagenet/deit_base
"""

from dataclasses import replace

from fastvim_jax.models import model_config, upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 150, "parameters": 144_179_756}

base = load_experiment("ade20k/fastvim_tiny")
config = replace(
    base,
    model=upernet(
        model_config(
            "vit_base_patch16_224",
            drop_path=0.1,
            dtype="bfloat16",
            blocks="unroll",
        ),
        neck="multilevel",
    ),
)

"""DeiT-S with UperNet on ADE20K, beside fastvim_small.py: no result is recorded, 57,998,252 parameters.

The recipe of fastvim_tiny.py, on the pyramid of a MultiLevelNeck as in the DeiT baselines.
Cost: 4.2e+18 FLOPs (6 x 276 GMACs per image, 215 of them in the heads); time not measured.

    fastvim train ade20k/deit_small --init runs/imagenet/deit_small
"""

from dataclasses import replace

from fastvim_jax.models import model_config, upernet
from fastvim_jax.training import load_experiment

claims = {"classes": 150, "parameters": 57_998_252}

base = load_experiment("ade20k/fastvim_tiny")
config = replace(
    base,
    model=upernet(
        model_config(
            "vit_small_patch16_224",
            drop_path=0.1,
            dtype="bfloat16",
            blocks="unroll",
        ),
        neck="multilevel",
    ),
)

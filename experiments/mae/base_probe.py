"""Linear probe of mae/base_pretrain with the recipe of large_probe.py. No result of the paper: it has Large only.

97,670,632 parameters. Cost: 4.4e16 FLOPs (2 × 17.12 GMACs per image); time not measured. The
features take 4 GB of memory.

    fastvim train mae/base_probe
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 97_670_632}

model = model_config("fastvim_base_patch16_224", dtype="bfloat16", activations="compute")
config = replace(load_experiment("mae/large_probe"), model=model, init="runs/mae/base_pretrain")

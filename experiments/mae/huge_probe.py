"""Linear probe of mae/huge_pretrain with the recipe of large_probe.py. No result of the paper: it has Large only.

702,370,280 parameters. Cost: 4.2e17 FLOPs (2 × 163.44 GMACs per image); time not measured. The
features take 6 GB of memory.

    fastvim train mae/huge_probe
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 702_370_280}

model = model_config("fastvim_huge_patch14_224", dtype="bfloat16", activations="compute")
config = replace(load_experiment("mae/large_probe"), model=model, init="runs/mae/huge_pretrain")

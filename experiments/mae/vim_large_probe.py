"""Linear probe of mae/vim_large_pretrain: 45.6 % top-1 in the paper (Table 15), FastVim-L 60.2.

The recipe of large_probe.py. 340,231,144 parameters. Cost: 1.8e17 FLOPs (2 × 71.62 GMACs per image); time not measured.

    fastvim train mae/vim_large_probe
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 340_231_144}

model = model_config("vim_large_patch16_224", dtype="bfloat16", activations="compute")
base = load_experiment("mae/large_probe")
config = replace(base, model=model, init="runs/mae/vim_large_pretrain")

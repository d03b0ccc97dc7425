"""FastVim-S with LayerNorm also before each mixer and the head: 80.9 % top-1 (Table 17), 25,842,280 parameters.

Its base, fastvim_small.py, has RMSNorm there (RMS-LN): 81.1 %. Cost: 1.0e19 FLOPs (6 × 4.37 GMACs per image); time not
measured.

    fastvim train imagenet/fastvim_small_ln_ln
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_842_280}

base = load_experiment("imagenet/fastvim_small")
config = replace(base, model=replace(base.model, norm="layer"))

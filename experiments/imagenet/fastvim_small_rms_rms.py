"""FastVim-S with RMSNorm also between scan and gate: 80.7 % top-1 (Table 17), 25,814,248 parameters.

Its base, fastvim_small.py, has LayerNorm there (RMS-LN): 81.1 %. Cost: 1.0e19 FLOPs (6 × 4.37 GMACs per image); time
not measured.

    fastvim train imagenet/fastvim_small_rms_rms
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 25_814_248}

base = load_experiment("imagenet/fastvim_small")
config = replace(base, model=replace(base.model, post_norm="rms"))

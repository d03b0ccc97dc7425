"""Linear probe of mae/large_pretrain without the scaling factor (`pool_scale`): 0.02 % top-1 (Table 15).

With it, the paper has 60.2 %. 340,229,096 parameters. Cost: 1.5e17 FLOPs (2 × 60.37 GMACs per image); time not
measured.

    fastvim train mae/large_unscaled_probe
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 340_229_096}

config = replace(load_experiment("mae/large_probe"), scale_from_init=False)

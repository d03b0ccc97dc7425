"""FastVim-L fine-tuned without the scaling factor (`pool_scale`): 84.6 % top-1 (Table 14); with it: 84.9 %.

340,229,096 parameters. Cost: 2.3e19 FLOPs (6 × 60.37 GMACs per image); time not measured.

    fastvim train mae/large_unscaled_finetune
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 340_229_096}

config = replace(load_experiment("mae/large_finetune"), scale_from_init=False)

"""FastMaskVim-B with true means of rows: fine-tuned 82.8 % top-1 (Table 12); with the default divisor 83.0 %.

101,178,112 parameters. Cost: 6.6e19 FLOPs (6 × 5.40 GMACs per image); time not measured.
Fine-tune it by base_finetune.py with --init runs/mae/base_true_mean_pretrain; `pool_scale` then stays 1, because the
size of true means does not depend on the mask.

    fastvim train mae/base_true_mean_pretrain
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 0, "parameters": 101_178_112}

base = load_experiment("mae/base_pretrain")
config = replace(base, model=replace(base.model, divisor="count"))

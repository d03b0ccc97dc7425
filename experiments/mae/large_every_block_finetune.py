"""FastVim-L fine-tuned with rates that fall at every block: 83.9 % top-1 (Table 13); at every second block: 84.9 %.

340,229,096 parameters. Cost: 2.3e19 FLOPs (6 × 60.37 GMACs per image); time not measured.

    fastvim train mae/large_every_block_finetune
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 340_229_096}

base = load_experiment("mae/large_finetune")
config = replace(base, optimizer=replace(base.optimizer, layer_rule="blocks"))

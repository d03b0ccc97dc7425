"""FastVim-H fine-tuned from mae/huge_pretrain at 224 px: 86.1 % top-1 in the paper.

The recipe of base_finetune.py with 50 epochs, a base learning rate of 1e-3 and a layer-wise factor of 0.75.
702,370,280 parameters. Cost: 6.3e19 FLOPs (6 × 163.44 GMACs per image); time not measured.

    fastvim train mae/huge_finetune
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 702_370_280}

base = load_experiment("mae/base_finetune")
options = {"drop_path": 0.3, "dtype": base.model.dtype, "activations": base.model.activations}
config = replace(
    base,
    init="runs/mae/huge_pretrain",
    model=model_config("fastvim_huge_patch14_224", **options),
    optimizer=replace(base.optimizer, learning_rate=1e-3, layer_decay=0.75),
    epochs=50,
)

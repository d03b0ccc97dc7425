"""FastVim-L fine-tuned from mae/large_pretrain at 224 px: 84.9 % top-1 in the paper, Vim-L 85.1.

The recipe of base_finetune.py with 50 epochs, a base learning rate of 1e-3 and a layer-wise factor of 0.75.
340,229,096 parameters. Cost: 2.3e19 FLOPs (6 × 60.37 GMACs per image); time not measured.

    fastvim train mae/large_finetune
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 340_229_096}

base = load_experiment("mae/base_finetune")
options = {"drop_path": 0.3, "dtype": base.model.dtype, "activations": base.model.activations}
config = replace(
    base,
    init="runs/mae/large_pretrain",
    model=model_config("fastvim_large_patch16_224", **options),
    optimizer=replace(base.optimizer, learning_rate=1e-3, layer_decay=0.75),
    epochs=50,
)

"""FastVim-H fine-tuned from mae/huge_pretrain at 448 px: 86.7 % top-1 in the paper.

The recipe of huge_finetune.py, but position embeddings are resampled to a grid of 32 x 32, the head's initial weights
have a standard deviation of 2e-5, and the gradient norm is clipped at 3.0. 703,353,320 parameters. Cost: 2.5e20 FLOPs
(6 × 650.22 GMACs per image); time not measured.

    fastvim train mae/huge_448_finetune
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 703_353_320}

base = load_experiment("mae/huge_finetune")
config = replace(
    base,
    model=replace(base.model, image_size=448, head_std=2e-5),
    data=replace(base.data, image_size=448),
    optimizer=replace(base.optimizer, clip_grad_norm=3.0),
)

"""FastVim-B fine-tuned from mae/base_pretrain at 224 px: 83.0 % top-1 in the paper, Vim-B 83.3.

100 epochs, batch 1024, drop path 0.3, mixup and cutmix. The learning rate falls by a factor of 0.65 every two blocks
towards the input. `pool_scale` becomes 0.25, that is 1 - mask ratio. 97,670,632 parameters. Cost: 1.3e19 FLOPs (6 ×
17.12 GMACs per image); time not measured.

    fastvim train mae/base_finetune
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 1000, "parameters": 97_670_632}

base = load_experiment("imagenet/fastvim_base")
config = replace(
    base,
    init="runs/mae/base_pretrain",
    model=replace(base.model, drop_path=0.3),
    optimizer=replace(
        base.optimizer,
        learning_rate=5e-4,
        learning_rate_scaling="linear",
        schedule="epoch_cosine",
        warmup_epochs=5.0,
        final_learning_rate=1e-5,
        decay_groups="finetune",
        layer_decay=0.65,
    ),
    epochs=100,
    ema_decay=None,
)

"""cifar10/fastvim.py trained from scratch for 30 epochs, the baseline of finetune.py.

fastvim train mae_cifar10/scratch
"""

from dataclasses import replace

from fastvim_jax.training import load_experiment

claims = {"classes": 10, "parameters": 3_417_610}

base = load_experiment("cifar10/fastvim")
config = replace(
    base,
    model=replace(base.model, drop_path=0.1),
    optimizer=replace(base.optimizer, learning_rate=2e-3, warmup_epochs=None, warmup_share=0.1),
    epochs=30,
    checkpoint_every_steps=3000,
)

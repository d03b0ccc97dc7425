"""Linear probe of mae/large_pretrain: 60.2 % top-1 in the paper (Table 15).

There, Vim-L has 45.6 %, and this model without the scaling factor (`pool_scale`) 0.02 %. 90 epochs, batch 4096, SGD at
0.1 * batch / 256. The features of 1,281,167 images are computed once and take 5 GB of memory. 340,229,096 parameters.
Cost: 1.5e17 FLOPs (2 × 60.37 GMACs per image); time not measured.

    fastvim train mae/large_probe
"""

from dataclasses import replace

from fastvim_jax.models import model_config
from fastvim_jax.training import load_experiment
from fastvim_jax.training.masked.config import ProbeConfig

claims = {"classes": 1000, "parameters": 340_229_096}

base = load_experiment("mae/large_finetune")
config = ProbeConfig(
    model=model_config("fastvim_large_patch16_224", dtype="bfloat16", activations="compute"),
    data=replace(
        base.data, batch_size=4096, rand_augment=None, random_erasing=0.0, mixup=0.0, cutmix=0.0
    ),
    init="runs/mae/large_pretrain",
    evaluate_every_epochs=10,
)

"""FastChannelVim-S/16: 73.6 % top-1 on JUMP-CP (Table 3).

The recipe of every file in this folder: 100 epochs, batch 256, AdamW with a weight decay that rises from 0.04 to 0.4,
hierarchical channel sampling (the drawn channels stay in order). Set FASTVIM_JUMP_CP to a folder that `fastvim data
prepare --source jump_cp` wrote for the plate BR00116991 (splits train, val, test); see docs/cells.md. Mean and standard
deviation are the published ones of that plate, for pixels scaled as in its publication. For your own shards give
--data.mean and --data.std without numbers, which takes those of `fastvim data stats`.

25,316,129 parameters. Cost: 208 GFLOPs per image and epoch (6 × 34.66 GMACs); time not measured.

    fastvim train jumpcp/fastchannelvim_small_16
"""

from fastvim_jax.data import CellsData
from fastvim_jax.data.cells_config import JUMP_CP_MEAN, JUMP_CP_STD
from fastvim_jax.models import model_config
from fastvim_jax.training import OptimizerConfig, TrainConfig

claims = {"classes": 161, "parameters": 25_316_129}

config = TrainConfig(
    model=model_config(
        "fastchannelvim_small_patch16_224",
        num_classes=161,
        drop_path=0.05,
        dtype="bfloat16",
        activations="compute",
    ),
    data=CellsData(
        path="$FASTVIM_JUMP_CP",
        eval_split="val",
        image_size=224,
        batch_size=256,
        workers=16,
        mean=JUMP_CP_MEAN,
        std=JUMP_CP_STD,
        channel_sampling="sorted",
        flip=0.5,
        defocus=0.5,
        defocus_radius=(1, 3),
        dropout=0.5,
        dropout_holes=10,
        dropout_size=10,
    ),
    optimizer=OptimizerConfig(
        learning_rate=1e-3,
        learning_rate_scaling="linear",
        warmup_epochs=10.0,
        warmup_start=0.0,
        final_learning_rate=1e-6,
        weight_decay=0.04,
        weight_decay_end=0.4,
        decay_groups="cell",
    ),
    epochs=100,
    label_smoothing=0.0,
    ema_decay=None,
)

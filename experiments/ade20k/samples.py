"""A small FastVim with UperNet memorises the three real ADE20K sample images, in minutes on two CPU cores.

It shows that the whole path works (folder, masks, crops, training, slide inference, pictures). It shows nothing about
generalisation, because it is evaluated on its training images. Seen: 95.5 % of the pixels right, mIoU 62.9 % (300
steps, 2 minutes of processor time); 96.6 % and 71.4 % after 900 steps on a GPU (benchmarks/dense.md).

Set FASTVIM_DATA_DIR to the folder that holds `ade20k_samples` with `images/validation`, `annotations/validation` and
`objectInfo150.csv`.

    fastvim train ade20k/samples
"""

from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.models import VisionMambaConfig, upernet
from fastvim_jax.training import OptimizerConfig
from fastvim_jax.training.segmentation.config import SegmentationConfig

claims = {"classes": 150, "parameters": 806_892}

config = SegmentationConfig(
    model=upernet(
        VisionMambaConfig(patch_size=8, embed_dim=64, depth=8, state_size=8),
        image_size=96,
        channels=64,
        auxiliary_channels=32,
    ),
    data=SegmentationData(
        path="$FASTVIM_DATA_DIR/ade20k_samples",
        train_split="validation",
        zero_is_ignored=True,
        image_size=96,
        fit=(256, 96),
        scale=(1.0, 1.0),
        max_share=1.0,
        photometric=False,
        flip=0.0,
        batch_size=4,
        repeat=40,
        eval_stride=64,
    ),
    optimizer=OptimizerConfig(
        learning_rate=2e-3,
        learning_rate_scaling="none",
        schedule="warmup_linear",
        warmup_epochs=1.0,
        warmup_start=1e-5,
        weight_decay=0.01,
        decay_groups="segmentation",
    ),
    epochs=10,
    evaluate_every_epochs=2,
    log_every_steps=30,
)

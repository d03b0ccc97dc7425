"""FastVim-T with UperNet on ADE20K (150 classes, 512 px): 41.8 mIoU in the paper (section 4.5), 35,229,164 parameters.

The recipe of every file in this folder:

- Steps: 20,210 images, 160,000 steps of 16 crops (here 127 whole epochs, 160,401 steps).
- Optimizer: AdamW, learning rate 6e-5, weight decay 0.01, 1500 steps of warm-up, then linear decay to 0.
- Augmentation: images are resized by a factor of 0.5 to 2, cropped, flipped, and distorted in colour.
- Evaluation: a 512 px window slides by 341 px.

It starts from ImageNet weights:

    fastvim train ade20k/fastvim_tiny --init runs/imagenet/fastvim_tiny

The released models differ in two options: they were trained with `--loss-divisor all`, and with LayerNorm in the blocks
(`norm="layer"`, and init_allow "backbone.blocks.*.norm.bias" because the ImageNet weights have no biases there).

Cost: 5.3e+17 FLOPs (6 x 34 GMACs per image, 28 of them in the heads); time not measured.

Set FASTVIM_ADE20K_DIR to ADEChallengeData2016, which holds `images` and `annotations`, and put `objectInfo150.csv` or
a `classes.txt` of 150 names there.
"""

from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.models import model_config, upernet
from fastvim_jax.training.segmentation.config import SegmentationConfig

claims = {"classes": 150, "parameters": 35_229_164}

config = SegmentationConfig(
    model=upernet(
        model_config(
            "fastvim_tiny_patch16_224",
            drop_path=0.05,
            dtype="bfloat16",
            activations="compute",
            blocks="unroll",
        ),
    ),
    data=SegmentationData(path="$FASTVIM_ADE20K_DIR", zero_is_ignored=True, workers=16),
)

"""FastVim-T with Cascade Mask R-CNN on COCO (80 classes, 1024 px): box AP 45.1, mask AP 39.0 in the paper
(section 4.6), 66,359,202 parameters.

The recipe of every file in this folder:

- Model: ViTDet's simple pyramid and three cascade stages.
- Steps: 118,287 images, 184,375 steps of 64 images (here 100 whole epochs).
- Optimizer: AdamW, learning rate 1e-4, weight decay 0.05, gradient norm clipped at 35, 250 steps of warm-up. The rate
  falls to a tenth after 8/9 and again after 26/27 of the run. Each layer has 0.7 times the rate of the layer after it.
- Augmentation: images are flipped, resized by a factor of 0.1 to 2, cropped and padded to 1024 px.

It starts from ImageNet weights:

    fastvim train coco/fastvim_tiny --init runs/imagenet/fastvim_tiny

The released models differ in three options: `--optimizer.decay-groups detection_released` decays the norms, too,
`--optimizer.layer-rule detection_released` gives all blocks the full rate, and the blocks have LayerNorm
(`norm="layer"`).

Cost: not measured.

Set FASTVIM_COCO_DIR to the folder that holds `annotations`, `train2017` and `val2017`.
"""

from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.models import cascade_mask_rcnn, model_config
from fastvim_jax.training.detection.config import DetectionConfig

claims = {"classes": 80, "parameters": 66_359_202}

config = DetectionConfig(
    model=cascade_mask_rcnn(
        model_config(
            "fastvim_tiny_patch16_224",
            image_size=1024,
            drop_path=0.1,
            dtype="bfloat16",
            activations="compute",
            blocks="unroll",
        ),
    ),
    data=DetectionData(path="$FASTVIM_COCO_DIR", workers=16),
)

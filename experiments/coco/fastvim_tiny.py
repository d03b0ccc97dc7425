"""FastVim-T with Cascade Mask R-CNN on COCO (80 classes, 1024 px): box AP 45.1, mask AP 39.0 in the paper
(section 4.6), 66,359,202 parameters.

The recipe of every file in this folder: ViTDet's simple pyramid, three stages; 118,287 images, 184,375 steps of 64
(here 100 whole epochs), AdamW 1e-4, decay 0.05, clipped at 35, 250 steps of warm-up, a tenth of the rate
from 8/9 and 26/27 of the run on, layer-wise rates of 0.7; flipped, resized by 0.1 to 2, cropped and padded to 1024 px.
It starts from ImageNet weights:

    fastvim train coco/fastvim_tiny --init runs/imagenet/fastvim_tiny

The released models were trained with `--optimizer.decay-groups detection_released` and `--optimizer.layer-rule
detection_released`, which decay the norms and give all blocks the full rate, and with LayerNorm in the blocks
(`norm="layer"`): all are options here.

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

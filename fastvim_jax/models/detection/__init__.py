"""Define detectors with plain backbones: Cascade Mask R-CNN, Mask R-CNN and Faster R-CNN.

Read `config` first, then `cascade` (the whole detector, from images to detections), then the parts in the order in
which it calls them: `simple_fpn` (the pyramid), `anchors` and `rpn` (proposals), `roi_align` (features of a box),
`heads`, `nms`. `matching` and `masks` prepare training targets.

Boxes are (x1, y1, x2, y2) in pixels, continuous and without +1, see `boxes`. Deltas say how a box moves, see
`boxes.encode_deltas`. All numbers of boxes are static: arrays are padded, and boolean arrays `valid` mark real entries.
"""

from fastvim_jax.models.detection.cascade import CascadeRCNN, Detections
from fastvim_jax.models.detection.config import (
    CASCADE,
    DetectorConfig,
    ProposalConfig,
    StageConfig,
    cascade_mask_rcnn,
)

__all__ = [
    "CASCADE",
    "CascadeRCNN",
    "Detections",
    "DetectorConfig",
    "ProposalConfig",
    "StageConfig",
    "cascade_mask_rcnn",
]

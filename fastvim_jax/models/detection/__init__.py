"""Detectors with plain backbones: Cascade Mask R-CNN, Mask R-CNN and Faster R-CNN."""

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

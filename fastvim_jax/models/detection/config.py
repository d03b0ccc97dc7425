"""Configuration of the detectors: Cascade Mask R-CNN, and with one stage or no masks Mask R-CNN and Faster R-CNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastvim_jax.errors import UserError
from fastvim_jax.models.config import ModelConfig
from fastvim_jax.models.detection.boxes import Stds


@dataclass(frozen=True)
class ProposalConfig:
    """The region proposal network: its anchors, what it trains on and what it proposes."""

    convs: int = 2
    """Convolutions before the scores and deltas."""
    scale: float = 8.0
    """Side of a square anchor in cells of its level."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors."""
    positive: float = 0.7
    """Least IoU of an anchor that belongs to an object."""
    negative: float = 0.3
    """Below this IoU an anchor is background; also the least IoU of an object's best anchors, which belong to it."""
    samples: int = 256
    """Anchors an image that a step trains on."""
    fraction: float = 0.5
    """Largest share of positives among them."""
    beta: float = 1 / 9
    """Where the smooth L1 loss of the deltas becomes linear."""
    nms: float = 0.7
    """Proposals of one level that overlap a better one by more are dropped."""
    train_before: int = 2000
    """Proposals a level before suppression, in training."""
    train_after: int = 2000
    """Proposals an image after it, in training."""
    test_before: int = 1000
    """Proposals a level before suppression, in detection."""
    test_after: int = 1000
    """Proposals an image after it, in detection."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of the cascade."""

    overlap: float = 0.5
    """Least IoU of a box that belongs to an object; below it is background."""
    stds: Stds = (0.1, 0.1, 0.2, 0.2)
    """What the deltas are divided by."""
    weight: float = 1.0
    """Weight of the stage's losses."""


CASCADE = (
    StageConfig(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    StageConfig(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    StageConfig(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


@dataclass(frozen=True)
class DetectorConfig:
    """A detector on a plain backbone.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    backbone: ModelConfig
    """FastVim, Vim or ViT with one entry in `out_indices` and square patches of 16 pixels."""
    num_classes: int = 80
    """Classes of objects; background is one more."""
    width: int = 256
    """Channels of the pyramid and of the heads."""
    norm_eps: float = 1e-5
    """Added to the variance in the norms of neck and heads."""
    rpn: ProposalConfig = ProposalConfig()
    """The region proposal network."""
    stages: tuple[StageConfig, ...] = CASCADE
    """Stages of the cascade; a single one makes a Mask R-CNN."""
    masks: bool = True
    """Predict masks; without them one stage makes a Faster R-CNN."""
    box_convs: int = 4
    """Convolutions of a box head."""
    hidden: int = 1024
    """Width of a box head's fully connected layer."""
    mask_convs: int = 4
    """Convolutions of a mask head before it doubles its resolution."""
    class_agnostic: bool = False
    """One set of deltas for all classes, instead of one for each."""
    box_loss: Literal["l1", "smooth_l1"] = "l1"
    """Loss of the box heads' deltas; smooth_l1 is quadratic below 1."""
    samples: int = 512
    """Boxes an image that a stage trains on."""
    fraction: float = 0.25
    """Largest share of positives among them."""
    score: float = 0.05
    """Detections need a higher score."""
    nms: float = 0.5
    """Detections of one class that overlap a better one by more are dropped."""
    detections: int = 100
    """Detections an image."""
    candidates: int = 4096
    """Pairs of box and class an image that enter suppression, the best by score. The result is that of all pairs
    whenever no more reach `score`, or `detections` of these survive."""

    def __post_init__(self) -> None:
        if len(self.backbone.out_indices) != 1:
            raise UserError(
                f"backbone.out_indices={self.backbone.out_indices}: a detector reads one block; give the last one, "
                f"({self.backbone.depth - 1},)."
            )
        if self.backbone.patch != (16, 16):
            raise UserError(
                f"backbone.patch_size={self.backbone.patch_size}: the pyramid's strides 4 to 64 need 16."
            )
        if self.backbone.embed_dim % 4:
            raise UserError(
                f"backbone.embed_dim={self.backbone.embed_dim} must be a multiple of 4."
            )
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise UserError("stages is empty: give at least one StageConfig.")
        for name in ("num_classes", "width", "hidden", "samples", "detections", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("fraction", "score", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must lie within 0 and 1.")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of a cell at each level of the pyramid."""
        return (4, 8, 16, 32, 64)

    @property
    def precision(self):  # noqa: ANN201
        """The dtype policy, the backbone's."""
        return self.backbone.precision

    @property
    def box_classes(self) -> int:
        """Sets of deltas a box head predicts."""
        return 1 if self.class_agnostic else self.num_classes

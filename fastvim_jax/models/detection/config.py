"""Configuration of the detectors: Cascade Mask R-CNN, and with one stage or no masks Mask R-CNN and Faster R-CNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

from fastvim_jax.config_checks import (
    PositiveFloat,
    PositiveInt,
    Probability,
    check_fields,
)
from fastvim_jax.errors import UserError
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig, Width, replace_options
from fastvim_jax.precision import Precision

Convs = Annotated[int, Interval(ge=0, le=64)]
Four = tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat]


@dataclass(frozen=True)
class ProposalConfig:
    """The region proposal network: its anchors, its training targets, and how many boxes it proposes."""

    convs: Convs = 2
    """Convolutions before the scores and deltas."""
    scale: PositiveFloat = 8.0
    """Side of a square anchor in cells of its level."""
    ratios: tuple[PositiveFloat, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors."""
    positive: Probability = 0.7
    """Least IoU of an anchor that belongs to an object."""
    negative: Probability = 0.3
    """Below this IoU an anchor is background. An object also gets its best anchors, if their IoU is at least this."""
    samples: PositiveInt = 256
    """Anchors per image that a step trains on."""
    fraction: Probability = 0.5
    """Largest share of positives among them."""
    beta: PositiveFloat = 1 / 9
    """Where the smooth L1 loss of the deltas becomes linear."""
    nms: Probability = 0.7
    """Proposals of one level whose IoU with a better one exceeds this are dropped."""
    train_before: PositiveInt = 2000
    """Proposals per level before suppression, in training."""
    train_after: PositiveInt = 2000
    """Proposals per image after suppression, in training."""
    test_before: PositiveInt = 1000
    """Proposals per level before suppression, in detection."""
    test_after: PositiveInt = 1000
    """Proposals per image after suppression, in detection."""

    def __post_init__(self) -> None:
        check_fields(self, "model.rpn.")


@dataclass(frozen=True)
class StageConfig:
    """One stage of the cascade."""

    overlap: Probability = 0.5
    """Least IoU of a box that belongs to an object. Other boxes are background."""
    stds: Four = (0.1, 0.1, 0.2, 0.2)
    """Standard deviations that the deltas of x, y, width and height are divided by."""
    weight: PositiveFloat = 1.0
    """Weight of the stage's losses."""

    def __post_init__(self) -> None:
        check_fields(self, "model.stages.")


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

    backbone: VisionMambaConfig | ViTConfig | ChannelMambaConfig | ChannelViTConfig
    """FastVim, Vim or ViT with one entry in `out_indices` and square patches of 16 pixels."""
    num_classes: PositiveInt = 80
    """Classes of objects; background is one more."""
    width: Width = 256
    """Channels of the pyramid and of the heads."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance in the norms of neck and heads. The released detectors were trained with 1e-5, because
    their builder replaced the norm's own value."""
    rpn: ProposalConfig = ProposalConfig()
    """The region proposal network."""
    stages: tuple[StageConfig, ...] = CASCADE
    """Stages of the cascade; a single one makes a Mask R-CNN."""
    masks: bool = True
    """Predict masks; without them one stage makes a Faster R-CNN."""
    box_convs: Convs = 4
    """Convolutions of a box head."""
    hidden: Width = 1024
    """Width of a box head's fully connected layer."""
    mask_convs: Convs = 4
    """Convolutions of a mask head before it doubles its resolution."""
    class_agnostic: bool = False
    """One set of deltas for all classes, instead of one for each."""
    box_loss: Literal["l1", "smooth_l1"] = "l1"
    """Loss of the box heads' deltas; smooth_l1 is quadratic below 1."""
    samples: PositiveInt = 512
    """Boxes per image that a stage trains on."""
    fraction: Probability = 0.25
    """Largest share of positives among them."""
    score: Probability = 0.05
    """Least score of a detection (exclusive)."""
    nms: Probability = 0.5
    """Detections of one class whose IoU with a better one exceeds this are dropped."""
    detections: PositiveInt = 100
    """Largest number of detections per image."""
    candidates: PositiveInt = 4096
    """Pairs of box and class per image that enter suppression, the best by score. If no more pairs than this reach
    `score`, or if `detections` of them survive, the result is the same as with all pairs."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")
        if len(self.backbone.out_indices) != 1:
            raise UserError(
                f"backbone.out_indices={self.backbone.out_indices}: a detector reads one block, the last one "
                f"({self.backbone.depth - 1},); fastvim_jax.models.cascade_mask_rcnn() chooses it."
            )
        if self.backbone.patch != (16, 16):
            raise UserError(
                f"backbone.patch_size={self.backbone.patch_size}: the pyramid's strides 4 to 64 need 16."
            )
        if self.backbone.embed_dim % 4:
            raise UserError(
                f"backbone.embed_dim={self.backbone.embed_dim} must be a multiple of 4."
            )
        if not self.stages:
            raise UserError("stages is empty: give at least one StageConfig.")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of a cell at each level of the pyramid."""
        return (4, 8, 16, 32, 64)

    @property
    def precision(self) -> Precision:
        """The dtype policy, that of the backbone."""
        return self.backbone.precision

    @property
    def dtype(self) -> str:
        """Name of the dtype in which products are computed."""
        return self.backbone.dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width for which the backbone's position embeddings are made."""
        return self.backbone.image_size  # type: ignore[return-value]  # a pair once it is checked


def cascade_mask_rcnn(
    backbone: VisionMambaConfig | ViTConfig | ChannelMambaConfig | ChannelViTConfig, **options: Any
) -> DetectorConfig:
    """Configure a Cascade Mask R-CNN that reads the last block of a backbone.

    `stages=(StageConfig(),)` makes it a Mask R-CNN; with `masks=False` as well it is a Faster R-CNN. Build the model
    with `fastvim_jax.models.build_model`.

    Args:
        backbone: for example `model_config("fastvim_tiny", image_size=1024)`; any FastVim, Vim or ViT.
        **options: fields of `DetectorConfig`.

    Raises:
        UserError: an impossible value.
    """
    if len(backbone.out_indices) != 1:
        backbone = replace_options(backbone, out_indices=(backbone.depth - 1,))
    return DetectorConfig(replace_options(backbone, num_classes=0), **options)

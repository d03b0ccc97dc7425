"""The configuration of a segmentation run; its defaults are the ADE20K recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastvim_jax.config_checks import NonNegativeFloat, NonNegativeInt, PositiveInt, Rate
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.errors import UserError
from fastvim_jax.models import UperNetConfig
from fastvim_jax.training.config import OptimizerConfig, RunConfig, refuse
from fastvim_jax.training.segmentation.losses import Divisor

ADE20K_OPTIMIZER = OptimizerConfig(
    learning_rate=6e-5,
    learning_rate_scaling="none",
    schedule="warmup_linear",
    warmup_epochs=1500
    / 1263,  # 1500 steps: 20,210 images in batches of 16 are 1263 steps per epoch
    warmup_start=6e-11,
    weight_decay=0.01,
    decay_groups="segmentation",
)


@dataclass(frozen=True)
class SegmentationConfig(RunConfig):
    """Everything that decides a segmentation run.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    model: UperNetConfig
    """Backbone, neck and heads; model.num_classes must be the data's number of classes."""
    data: SegmentationData
    """Where images and masks come from, how they are cropped and batched."""
    scale_from_init: bool = True
    """If init names a masked run and model.backbone.pool_scale is 1, set it to 1 - mask_ratio."""
    optimizer: OptimizerConfig = field(default=ADE20K_OPTIMIZER)
    """AdamW, its groups and its schedules."""
    epochs: PositiveInt = 127
    """Passes over the training images; 127 of ADE20K are 160,000 steps."""
    ema_decay: Rate | None = None
    """Must be None: running statistics of batch norms belong to the trained weights, not to an average."""
    auxiliary_weight: NonNegativeFloat = 0.4
    """Weight of the auxiliary head's loss."""
    loss_divisor: Divisor = "valid"
    """valid: mean loss over labelled pixels. all: sum over labelled pixels divided by the number of all pixels, as the
    released models were trained."""
    eval_windows: PositiveInt = 2
    """Windows of one call of the model in evaluation, rounded up to the number of devices. An image of ADE20K has two
    or three; a call that they do not fill costs as much."""
    pictures: NonNegativeInt = 4
    """Images drawn after each evaluation, and as many of the worst; 0: no picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_decay is not None:
            refuse("", self, "ema_decay", "None: batch norms' running statistics are not averaged")
        if self.data.batch_size // self.accumulate < 2:
            raise UserError(
                f"data.batch_size={self.data.batch_size} in {self.accumulate} parts: batch norm needs at least two "
                "images at a time."
            )
        if self.model.image_size != self.data.height_width:
            raise UserError(
                f"model.backbone.image_size={self.model.image_size}, but data.image_size={self.data.image_size}: make "
                "them equal, or the model's position embedding is resized in every step."
            )

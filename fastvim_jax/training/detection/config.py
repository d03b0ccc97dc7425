"""The configuration of a detection run; its defaults are the COCO recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastvim_jax.config_checks import NonNegativeInt, PositiveInt, Rate
from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.errors import UserError
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.detection.config import DetectorConfig
from fastvim_jax.training.config import OptimizerConfig, RunConfig

COCO_OPTIMIZER = OptimizerConfig(
    learning_rate=1e-4,
    learning_rate_scaling="none",
    schedule="warmup_step",
    warmup_epochs=250 / 1848,  # 250 steps: 118,287 images in batches of 64 are 1848 steps per epoch
    warmup_start=1e-7,
    weight_decay=0.05,
    decay_groups="detection",
    layer_decay=0.7,
    layer_rule="blocks",
    clip_grad_norm=35.0,
)
"""The recipe as its authors meant it: layer-wise rates for all blocks, and no decay of their norms. The released
detectors were trained differently: set decay_groups and layer_rule to "detection_released" for that."""


@dataclass(frozen=True)
class DetectionConfig(RunConfig):
    """Everything that determines a detection run.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    model: DetectorConfig
    """Backbone, pyramid and heads. model.num_classes must equal the number of categories in the data."""
    data: DetectionData
    """Where images and objects come from, and how they are jittered and batched."""
    scale_from_init: bool = True
    """If init names a masked run and model.backbone.pool_scale is 1, set it to 1 - mask_ratio."""
    optimizer: OptimizerConfig = field(default=COCO_OPTIMIZER)
    """AdamW, its groups and its schedules."""
    epochs: PositiveInt = 100
    """Passes over the training images; 100 of COCO are 184,375 steps of 64 images."""
    ema_decay: Rate | None = None
    """Decay of the average of the weights that is evaluated beside them; None: no average, as in the recipe."""
    evaluate_train: bool = False
    """Also evaluate the training split, to see whether the model memorises a small set."""
    pictures: NonNegativeInt = 4
    """Images drawn after each evaluation; 0: no picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.masks and not self.data.masks:
            raise UserError(
                "model.masks=True, but data.masks=False: load masks, or set model.masks=False for boxes alone."
            )
        if self.model.backbone.image_size != self.data.height_width:
            raise UserError(
                f"model.backbone.image_size={self.model.backbone.image_size}, but data.image_size="
                f"{self.data.image_size}: make them equal, or the position embedding is resized in every step."
            )
        if self.data.eval_sizes and isinstance(self.model.backbone, ChannelViTConfig):
            raise UserError(
                "data.eval_sizes: a ChannelViT resamples its positions for every size; leave it empty."
            )
        if any(side % 32 for side in self.data.height_width):
            raise UserError(
                f"data.image_size={self.data.image_size}: sides must be multiples of 32, the stride of the pyramid's "
                "last pooled level."
            )

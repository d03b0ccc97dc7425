"""Define the configuration of a supervised run. An experiment file builds it, and the command line overrides fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fastvim_jax.config_checks import Rate
from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.errors import UserError
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.config import VisionMambaConfig, ViTConfig
from fastvim_jax.training.config import RunConfig


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Everything that determines a supervised run. Two runs of one config on one machine end with the same weights.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    averages_images: ClassVar[bool] = True

    model: VisionMambaConfig | ViTConfig | ChannelMambaConfig | ChannelViTConfig
    """The backbone and its head. model.num_classes must equal the number of classes in the data."""
    data: ClassificationData | CellsData = field(default_factory=ClassificationData)
    """Where the images come from, and how they are batched and augmented."""
    scale_from_init: bool = True
    """If init names a masked run and model.pool_scale is 1, set it to 1 - mask_ratio (0.25 for a ratio of 0.75)."""
    label_smoothing: Rate = 0.1
    """Mass of each target spread evenly over all classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.num_classes < 1 or self.model.out_indices:
            raise UserError(
                f"model.num_classes={self.model.num_classes}, model.out_indices={self.model.out_indices}: "
                "supervised training needs a classifier; set num_classes and leave out_indices empty."
            )
        if self.model.channels != self.data.channels:
            raise UserError(
                f"model.channels={self.model.channels}, but data.channels={self.data.channels}: make them equal."
            )
        if self.model.image_size != self.data.height_width:
            raise UserError(
                f"model.image_size={self.model.image_size}, but data.image_size={self.data.image_size}: make them "
                "equal, or the model's position embedding is resized in every step."
            )

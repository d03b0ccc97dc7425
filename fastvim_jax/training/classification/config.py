"""The configuration of a supervised run: what an experiment file builds and the command line overrides."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Everything that decides a supervised run; two runs of one config on one machine end in the same weights.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    model: VisionMambaConfig | ViTConfig | ChannelMambaConfig | ChannelViTConfig
    """The backbone and its head; model.num_classes must be the data's number of classes."""
    data: ClassificationData | CellsData = field(default_factory=ClassificationData)
    """Where the images come from, how they are batched and augmented."""
    scale_from_init: bool = True
    """Set model.pool_scale, if it is 1, to 1 - mask_ratio of the masked run that `init` names (0.25 for 0.75)."""
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

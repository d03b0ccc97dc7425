"""Define the configurations of masked pre-training and of linear probing. The defaults are the paper's recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastvim_jax.config_checks import NonNegativeFloat, NonNegativeInt, PositiveInt, Rate
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.errors import UserError
from fastvim_jax.models import MaskedAutoencoderConfig, VisionMambaConfig, ViTConfig
from fastvim_jax.training.config import OptimizerConfig, RunConfig, refuse

PRETRAINING = OptimizerConfig(
    learning_rate=1.5e-4,
    learning_rate_scaling="linear",
    schedule="epoch_cosine",
    warmup_share=0.025,  # 40 of 1600 epochs
    final_learning_rate=0.0,
    weight_decay=0.05,
    decay_groups="pretrain",
    beta2=0.95,
)
PROBING = OptimizerConfig(
    learning_rate=0.1,
    learning_rate_scaling="linear",
    schedule="epoch_cosine",
    warmup_share=1 / 9,  # 10 of 90 epochs
    final_learning_rate=0.0,
    weight_decay=0.0,
)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything that determines a masked pre-training run. Labels are not read.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    averages_images: ClassVar[bool] = True

    model: MaskedAutoencoderConfig
    """Encoder, decoder and mask."""
    data: ClassificationData = field(default_factory=ClassificationData)
    """Where the images come from, and how they are cropped, flipped and batched."""
    optimizer: OptimizerConfig = field(default=PRETRAINING)
    """AdamW, its groups and its schedules."""
    epochs: PositiveInt = 1600
    """Passes over the training images."""
    ema_decay: Rate | None = None
    """Decay of an average of the weights; None: no average."""
    normalise_pixels: bool = True
    """Predict each patch normalised by its own mean and deviation (norm-pixel loss). Otherwise predict the pixels."""
    pictures: NonNegativeInt = 8
    """Number of evaluation images whose reconstructions are drawn after every evaluation; 0: no picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_images(self)
        if self.normalise_pixels and math.prod(self.model.patch) * self.model.channels == 1:
            raise UserError(
                "normalise_pixels=True: patches of one number have no deviation to be normalised by. Take larger "
                "patches (model.encoder.patch_size), or set normalise_pixels=False."
            )
        for name in ("mixup", "cutmix", "random_erasing"):
            if getattr(self.data, name):
                raise UserError(
                    f"data.{name}={getattr(self.data, name)}: a masked autoencoder would learn to predict what it "
                    "paints over; set it to 0."
                )


@dataclass(frozen=True)
class ProbeConfig(RunConfig):
    """A linear probe: batch norm without parameters and a linear head on the features of a frozen backbone.

    Raises:
        UserError: on construction, for an impossible value; the message names the field and the fix.
    """

    saves_model: ClassVar[bool] = False

    model: VisionMambaConfig | ViTConfig
    """The backbone as a classifier. model.num_classes must equal the number of classes in the data."""
    data: ClassificationData = field(default_factory=ClassificationData)
    """Labelled images. Cached features are those of the evaluation crops, without augmentation."""
    scale_from_init: bool = True
    """If init names a masked run and model.pool_scale is 1, set it to 1 - mask_ratio."""
    optimizer: OptimizerConfig = field(default=PROBING)
    """Learning rate and schedule; Adam's fields are not used."""
    algorithm: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum (the paper), or LARS (the original recipe of masked autoencoders)."""
    momentum: Rate = 0.9
    """Momentum of SGD or LARS."""
    epochs: PositiveInt = 90
    """Passes over the training images."""
    ema_decay: Rate | None = None
    """Must be None: the head is not averaged."""
    cache_gigabytes: NonNegativeFloat = 8.0
    """Largest memory for cached features. If they need more, every epoch computes them anew from augmented images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_decay is not None:
            refuse("", self, "ema_decay", "None: the head is not averaged")
        if self.accumulate != 1:
            refuse("", self, "accumulate", "1: a probe's batch norm sees the whole batch")
        if not self.init:
            raise UserError(
                "init is empty: name the run folder, or the file, of a trained backbone."
            )
        if self.model.num_classes < 1 or self.model.out_indices:
            raise UserError(
                "a probe needs a classifier: set model.num_classes and leave out_indices empty."
            )
        _check_images(self)


def _check_images(config: PretrainConfig | ProbeConfig) -> None:
    if config.model.channels != config.data.channels:
        raise UserError(
            f"model.channels={config.model.channels}, but data.channels={config.data.channels}: make them equal."
        )
    if config.model.image_size != config.data.height_width:
        raise UserError(
            f"the model is built for images of {config.model.image_size} pixels, but data.image_size="
            f"{config.data.image_size}: make them equal."
        )

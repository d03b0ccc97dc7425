"""Settings of classification's data: crops and augmentation besides what every task shares."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from annotated_types import Interval

from fastvim_jax.config_checks import PositiveInt, Probability
from fastvim_jax.data.config import DataConfig

Share = Annotated[float, Interval(gt=0, le=1)]
Aspect = Annotated[float, Interval(ge=1e-3, le=1e3)]
Alpha = Annotated[float, Interval(ge=0, le=1000)]
Strength = Annotated[float, Interval(ge=0, le=10)]
Pad = Annotated[int, Interval(ge=0, le=4096)]


@dataclasses.dataclass(frozen=True)
class ClassificationData(DataConfig):
    """Labelled images, their crops and their augmentation; see `DataConfig` for the fields that every task shares.

    Raises:
        UserError: on construction, for an impossible value; the message names the field.
    """

    channels: Literal[1, 3] = 3
    """3: every image becomes RGB; 1: every image becomes greyscale."""
    crop: Literal["random_resized", "pad_shift", "resize"] = "random_resized"
    """Training crop: random resized crop; resize, pad and shift at random (small images); only resize."""
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    """random_resized: the crop's share of the image's area, lowest and highest."""
    crop_aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """random_resized: the crop's width over height, lowest and highest (log-uniform)."""
    pad: Pad = 4
    """pad_shift: zero pixels added on each side before a crop of the input size is taken at random."""
    flip: Probability = 0.5
    """Probability of a horizontal flip in training."""
    rand_augment: Strength | None = None
    """RandAugment's magnitude, from 0 to 10 (the recipes use 9); None: off."""
    rand_augment_std: Strength = 0.5
    """Standard deviation of the magnitude of each of RandAugment's operations."""
    colour_jitter: Strength = 0.0
    """Largest relative change of brightness, contrast and saturation (0.3 in the recipes, without RandAugment)."""
    random_erasing: Probability = 0.0
    """Probability that one box of a training image is filled with noise (0.25 in the recipes)."""
    mixup: Alpha = 0.0
    """Mixup's alpha (0.8 in the recipes); 0: off."""
    cutmix: Alpha = 0.0
    """Cutmix's alpha (1.0 in the recipes); 0: off."""
    mix_prob: Probability = 1.0
    """Probability that a group is mixed, if mixup or cutmix is on."""
    mix_switch_prob: Probability = 0.5
    """Probability that it is cutmix that mixes, if both are on."""
    mix_group: PositiveInt = 128
    """Neighbours in the batch that are mixed with each other, in one proportion: the recipes' batch of one device. A
    batch on several devices is then mixed without sending images between them."""
    eval_crop: Share = 0.875
    """Evaluation: share of the resized image's side that the centre crop keeps; 1: no border is cut."""
    augment_on: Literal["host", "device"] = "host"
    """Where training images are flipped, RandAugmented and jittered. device: the host only crops; the images differ
    from the host's by rounding, because the host draws for both. Erasing, mixup and cutmix are always the device's."""
    resident: bool = False
    """Decode all training images once and keep them on the device, where they are cropped and augmented."""
    resident_shares: PositiveInt = 1
    """resident: parts that the records are dealt into, each kept by one device alone; a multiple of the devices and a
    divisor of batch_size. Every batch takes equally many images from each. 1: one device keeps all."""
    resident_size: PositiveInt = 256
    """resident with crop=random_resized: side of the squares that images are kept as."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_scale", "crop_aspect"):
            low, high = getattr(self, name)
            self._require(low <= high, name, "lowest and highest, in this order")
        if self.mixup or self.cutmix:
            for name in ("batch_size", "mix_group"):
                self._require(
                    getattr(self, name) > 1, name, "more than 1, if mixup or cutmix is on"
                )
        if self.resident:
            self._check_resident()

    def _check_resident(self) -> None:
        """Resident images are augmented on the device alone."""
        for name in ("rand_augment", "colour_jitter"):
            used = getattr(self, name)
            allowed = not used or self.augment_on == "device"
            off = "None" if name == "rand_augment" else "0"
            self._require(allowed, name, f"{off}, or augment_on=device, if resident=True")

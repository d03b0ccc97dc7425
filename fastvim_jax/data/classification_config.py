"""Define the data settings of classification: crops and augmentation, besides what all tasks share."""

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
    """3: convert every image to RGB; 1: convert every image to greyscale."""
    crop: Literal["random_resized", "pad_shift", "resize"] = "random_resized"
    """Training crop. random_resized: a random box, resized; pad_shift: resize, pad, and cut at a random place (for
    small images); resize: resize only."""
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    """For random_resized: lowest and highest share of the image's area that is cropped."""
    crop_aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """For random_resized: lowest and highest ratio of the crop's width to its height (log-uniform)."""
    pad: Pad = 4
    """For pad_shift: pixels of zeros added on each side before a crop of the input size is taken at a random place."""
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
    """Probability of cutmix instead of mixup, if both are on."""
    mix_group: PositiveInt = 128
    """Size of a group: neighbours in the batch that are mixed with each other, in one proportion. 128 is the recipes'
    batch per device. If each device holds whole groups, no image is sent between devices."""
    eval_crop: Share = 0.875
    """For evaluation: share of the resized image's side that the centre crop keeps; 1: nothing is cut off."""
    augment_on: Literal["host", "device"] = "host"
    """Where training images are flipped, RandAugmented and colour-jittered. With device, the host only crops, and
    random resized crops of `source="pixels"` are made on the device, too. Both use the random numbers that the host
    draws, so their images differ by rounding only. Erasing, mixup and cutmix always run on the device."""
    resident: bool = False
    """Decode all training images once and keep them on the device, where they are cropped and augmented."""
    resident_shares: PositiveInt = 1
    """For resident: number of parts of the data set, each kept on one device. It must be a multiple of the number of
    devices and divide batch_size, because every batch takes equally many images from each part. 1: one device keeps
    all images."""
    resident_size: PositiveInt = 256
    """For resident with crop=random_resized: side, in pixels, of the squares that images are stored as."""

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
        """Refuse augmentation on the host, because resident images are augmented on the device only."""
        for name in ("rand_augment", "colour_jitter"):
            used = getattr(self, name)
            allowed = not used or self.augment_on == "device"
            off = "None" if name == "rand_augment" else "0"
            self._require(allowed, name, f"{off}, or augment_on=device, if resident=True")

"""Settings of classification's data: crops and augmentation besides what every task shares."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fastvim_jax.data.config import DataConfig


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
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """random_resized: the crop's share of the image's area, lowest and highest."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized: the crop's width over height, lowest and highest (log-uniform)."""
    pad: int = 4
    """pad_shift: zero pixels added on each side before a crop of the input size is taken at random."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    rand_augment: float | None = None
    """RandAugment's magnitude, from 0 to 10 (the recipes use 9); None: off."""
    rand_augment_std: float = 0.5
    """Standard deviation of the magnitude of each of RandAugment's operations."""
    colour_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation (0.3 in the recipes, without RandAugment)."""
    random_erasing: float = 0.0
    """Probability that one box of a training image is filled with noise (0.25 in the recipes)."""
    mixup: float = 0.0
    """Mixup's alpha (0.8 in the recipes); 0: off."""
    cutmix: float = 0.0
    """Cutmix's alpha (1.0 in the recipes); 0: off."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed, if mixup or cutmix is on."""
    mix_switch_prob: float = 0.5
    """Probability that it is cutmix that mixes, if both are on."""
    eval_crop: float = 0.875
    """Evaluation: share of the resized image's side that the centre crop keeps; 1: no border is cut."""
    resident: bool = False
    """Decode all training images once and keep them on the device, where they are cropped (pad_shift or resize)
    and flipped: for sets of small images."""

    def __post_init__(self) -> None:
        self._one_of("channels", (1, 3))
        super().__post_init__()
        self._one_of("crop", ("random_resized", "pad_shift", "resize"))
        self._whole("pad", 0)
        for name in ("flip", "random_erasing", "mix_prob", "mix_switch_prob"):
            self._require(0 <= getattr(self, name) <= 1, name, "a probability from 0 to 1")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            ok = math.isfinite(value) and value >= 0
            self._require(ok, name, "0 (off) or a positive number")
        ok = self.rand_augment is None or 0 <= self.rand_augment <= 10
        self._require(ok, "rand_augment", "a magnitude from 0 to 10, or None")
        self._require(self.rand_augment_std >= 0, "rand_augment_std", "0 or more")
        self._require(self.colour_jitter >= 0, "colour_jitter", "0 or more")
        self._require(0 < self.eval_crop <= 1, "eval_crop", "more than 0 and at most 1")
        ok = len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        self._require(ok, "crop_scale", "lowest and highest share, within 0 to 1")
        ok = len(self.crop_aspect) == 2 and 0 < self.crop_aspect[0] <= self.crop_aspect[1]
        self._require(ok, "crop_aspect", "lowest and highest positive ratio")
        if self.resident:
            self._check_resident()

    def _check_resident(self) -> None:
        """Resident images are augmented on the device, which knows crop and flip only."""
        self._require(self.crop != "random_resized", "crop", "pad_shift or resize if resident=True")
        self._require(self.rand_augment is None, "rand_augment", "None if resident=True")
        self._require(not self.colour_jitter, "colour_jitter", "0 if resident=True")

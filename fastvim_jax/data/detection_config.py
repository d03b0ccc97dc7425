"""Settings of detection's data: where annotations lie, large-scale jitter, room for objects."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastvim_jax.data.config import DataConfig
from fastvim_jax.data.sources.coco import ANNOTATIONS, IMAGES


@dataclasses.dataclass(frozen=True)
class DetectionData(DataConfig):
    """Images with boxes and masks; the defaults are the COCO recipe. See `DataConfig` for fields that tasks share.

    Raises:
        UserError: on construction, for an impossible value; the message names the field.
    """

    sources: ClassVar[tuple[str, ...]] = ("coco",)

    source: str = "coco"
    """coco: a JSON file in COCO's instances format beside image folders."""
    train_split: str = "train2017"
    """What {split} stands for in training."""
    eval_split: str = "val2017"
    """What {split} stands for in evaluation."""
    image_size: int | tuple[int, int] = 1024
    """Side, or height and width, to which images are padded, at the bottom and right."""
    batch_size: int = 64
    """Images per training step, over all processes."""
    annotations: str = ANNOTATIONS
    """The JSON file below data.path."""
    images: str = IMAGES
    """The folder of the images below data.path."""
    masks: bool = True
    """Load masks, from which boxes are computed anew after cropping; without them boxes are clipped."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Training: images are resized, aspect kept, to fit image_size times a factor drawn uniformly from this range."""
    flip: float = 0.5
    """Training: probability of a horizontal flip."""
    pad_value: int = 114
    """Level of the padding's pixels, before normalisation."""
    max_objects: int = 100
    """Training: room for objects of an image; of more, the largest are kept."""
    least_side: int = 32
    """Training: images with a shorter side are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.channels == 3, "channels", "3")
        self._require(
            0 < self.scale[0] <= self.scale[1], "scale", "lowest and highest positive factor"
        )
        self._require(0 <= self.pad_value <= 255, "pad_value", "a level from 0 to 255")
        self._require(0 <= self.flip <= 1, "flip", "a probability from 0 to 1")
        self._whole("max_objects", 1)
        self._whole("least_side", 0)

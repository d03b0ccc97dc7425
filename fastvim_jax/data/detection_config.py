"""Define the data settings of detection: where annotations lie, large-scale jitter, room for objects."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from annotated_types import Interval

from fastvim_jax.config_checks import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
)
from fastvim_jax.data.config import DataConfig, one_split_note
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
    """Split to train on: the value of {split} in `annotations` and `images`."""
    eval_split: str = "val2017"
    """Split to evaluate on: the value of {split} in `annotations` and `images`."""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 1024
    """Height and width in pixels to which images are padded, at the bottom and right (one number: square)."""
    batch_size: PositiveInt = 64
    """Images per training step, over all processes."""
    annotations: str = ANNOTATIONS
    """The JSON file of annotations, relative to data.path."""
    images: str = IMAGES
    """The folder of the images, relative to data.path."""
    masks: bool = True
    """Load masks. Boxes are then computed from the cropped masks; without masks they are clipped to the crop."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """In training, images are resized, aspect ratio kept, to fit image_size times a factor drawn uniformly from this
    range."""
    flip: Probability = 0.5
    """Probability of a horizontal flip in training."""
    pad_value: Annotated[int, Interval(ge=0, le=255)] = 114
    """Grey level of padding, from 0 to 255, before normalisation."""
    max_objects: PositiveInt = 100
    """Largest number of objects of a training image. If there are more, the largest are kept."""
    eval_sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    """Sizes (height, width) below image_size that evaluation and prediction may pad to. Each resized image gets the
    smallest one that holds it, or image_size, with one program for each size. By default image_size alone."""
    least_side: NonNegativeInt = 32
    """Training images with a side shorter than this many pixels are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.channels == 3, "channels", "3")
        self._require(
            not self.class_list, "class_list", "empty: the classes are the JSON file's categories"
        )
        self._require(self.scale[0] <= self.scale[1], "scale", "lowest and highest factor")
        height, width = self.height_width
        whole = all(side % 32 == 0 for size in self.eval_sizes for side in size)
        self._require(whole, "eval_sizes", "sizes whose sides are multiples of 32")
        fit = all(h <= height and w <= width for h, w in self.eval_sizes)
        self._require(
            fit, "eval_sizes", f"sizes (height, width) within image_size, {height} x {width}"
        )

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the smallest size of `eval_sizes` and `image_size` that holds a resized image of `size`."""
        holding = [s for s in self.eval_sizes if size[0] <= s[0] and size[1] <= s[1]]
        return min([*holding, self.height_width], key=lambda s: s[0] * s[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """One line if evaluation reads the objects of training, because there is one split."""
        return one_split_note(self, "annotations")

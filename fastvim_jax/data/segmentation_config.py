"""Define the data settings of segmentation: where masks lie, what labels mean, resizing, crops and distortion."""

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
from fastvim_jax.data.sources.mask_folder import IMAGE_PATTERN, MASK_PATTERN


@dataclasses.dataclass(frozen=True)
class SegmentationData(DataConfig):
    """Images with label maps; the defaults are the ADE20K recipe. See `DataConfig` for fields that tasks share.

    Raises:
        UserError: on construction, for an impossible value; the message names the field.
    """

    sources: ClassVar[tuple[str, ...]] = ("mask_folder",)

    source: str = "mask_folder"
    """mask_folder: image files and mask files, matched by patterns."""
    train_split: str = "training"
    """Split to train on: the value of {split} in the patterns."""
    eval_split: str = "validation"
    """Split to evaluate on: the value of {split} in the patterns."""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 512
    """Height and width of training crops and of evaluation windows, in pixels (one number: square)."""
    batch_size: PositiveInt = 16
    """Images per training step, over all processes."""
    image_pattern: str = IMAGE_PATTERN
    """Pattern of the images' paths, relative to data.path. {name} may contain folders; .* matches any image type."""
    mask_pattern: str = MASK_PATTERN
    """Pattern of the masks' paths. The mask of an image has the same {name}."""
    classes: NonNegativeInt = 0
    """Number of classes, if there is no class list."""
    zero_is_ignored: bool = False
    """Whether label 0 in the files means unlabelled, and label k means class k - 1, as in ADE20K."""
    ignored_label: NonNegativeInt = 255
    """Label in the files for pixels that do not count."""
    fit: tuple[PositiveInt, PositiveInt] = (2048, 512)
    """Largest longer and shorter side, in pixels. Images are resized to fit both, with their aspect ratio kept."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """In training, both sides of `fit` are multiplied by a factor drawn uniformly from this range."""
    max_share: Annotated[float, Interval(gt=0, le=1)] = 0.75
    """In training, a crop is drawn again, up to ten times, while one class fills more than this share; 1: never."""
    flip: Probability = 0.5
    """Probability of a horizontal flip in training."""
    photometric: bool = True
    """Distort brightness, contrast, saturation and hue in training."""
    repeat: PositiveInt = 1
    """How often an epoch passes over the training images; more than once for small data sets."""
    eval_stride: PositiveInt | tuple[PositiveInt, PositiveInt] = 341
    """Distance between evaluation windows: rows and columns, in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.channels == 3, "channels", "3")
        self._require(self.classes <= 255, "classes", "at most 255")
        self._require(self.fit[0] >= self.fit[1], "fit", "the longer side first")
        self._require(self.scale[0] <= self.scale[1], "scale", "lowest and highest factor")
        fits = all(1 <= s <= c for s, c in zip(self.stride, self.height_width, strict=True))
        self._require(fits, "eval_stride", f"from 1 to image_size {self.image_size}")

    @property
    def stride(self) -> tuple[int, int]:
        """Rows and columns between evaluation's windows."""
        stride = self.eval_stride
        return (stride, stride) if isinstance(stride, int) else (stride[0], stride[-1])

    @property
    def notes(self) -> tuple[str, ...]:
        """One line if evaluation reads the images of training, because there is one split."""
        return one_split_note(self, "image_pattern")

"""What to read, how to batch it and how to augment it: one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fastvim_jax.data.sources import SOURCES
from fastvim_jax.errors import UserError, suggest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data of a supervised run. Every value is a plain number, string or tuple, so it goes through JSON.

    Raises:
        UserError: on construction, for an impossible value; the message names the field.
    """

    source: str = "digits"
    """Where records come from: digits, packed_npz, image_folder, webdataset, array_record (what `fastvim data prepare`
    writes), hugging_face (Parquet files or class folders) or tfds."""
    path: str = ""
    """The data set's folder; `~` and environment variables such as $FASTVIM_DATA_DIR are expanded. tfds: a prepared
    folder, or a set's name in $TFDS_DATA_DIR. Unused by digits."""
    train_split: str = "train"
    """Split to train on: the file `<split>.npz` (packed_npz), the folder `<split>` (image_folder), the shards
    `<split>*.tar` (webdataset) or `<split>-*.parquet` (hugging_face), or the set's own name. A slice behind it takes
    a part of its records: train[5000:], counted in the source's own order (an image_folder's is by class)."""
    eval_split: str = "test"
    """Split to evaluate on; a slice as above: train[:5000]."""
    class_list: str = ""
    """Class list (.txt: one name a line; .tsv: label, folder, name) where the folder's own is not the right one."""
    image_size: int | tuple[int, int] = 224
    """Side, or height and width, of the model's input in pixels."""
    channels: Literal[1, 3] = 3
    """3: every image becomes RGB; 1: every image becomes greyscale."""
    batch_size: int = 128
    """Images a training step takes, over all processes."""
    eval_batch_size: int | None = None
    """Images an evaluation step takes, over all processes; None: batch_size."""
    workers: int = 0
    """Worker processes that decode and augment; 0: threads of this process. Never changes the batches."""
    decoder: Literal["auto", "pillow", "turbo"] = "auto"
    """turbo: libjpeg-turbo and a SIMD resizer (the extra `data`), several times faster, for upright colour JPEG files;
    pillow: Pillow for everything; auto: turbo if it is installed. Their pixels differ by rounding; see `turbo.py`."""
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
    mix_mode: Literal["batch"] = "batch"
    """What is mixed with what: the whole batch, with itself reversed, in the same proportion."""
    eval_crop: float = 0.875
    """Evaluation: share of the resized image's side that the centre crop keeps; 1: no border is cut."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted per channel, on a pixel scale of 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divides per channel, on a pixel scale of 0 to 1."""
    resident: bool = False
    """Decode all training images once and keep them on the device, where they are cropped (pad_shift or resize)
    and flipped: for sets of small images."""
    max_corrupt: int = 0
    """Undecodable training records replaced by others (and counted) before the run stops; 0: the first one stops it."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UserError(
                f"data.source {self.source!r} is not known: use one of {', '.join(SOURCES)}."
                + suggest(self.source, SOURCES)
            )
        if self.source != "digits" and not self.path:
            raise UserError(f"data.path is empty: the source {self.source!r} needs its folder.")
        _one_of("channels", self.channels, (1, 3))
        _one_of("decoder", self.decoder, ("auto", "pillow", "turbo"))
        _one_of("crop", self.crop, ("random_resized", "pad_shift", "resize"))
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        if len(sizes) not in (1, 2) or not all(_is_int(s) and s >= 1 for s in sizes):
            _fail("image_size", self.image_size, "a positive side, or height and width")
        _require(
            _is_int(self.batch_size) and self.batch_size >= 1, "batch_size", self, "at least 1"
        )
        if self.eval_batch_size is not None:
            ok = _is_int(self.eval_batch_size) and self.eval_batch_size >= 1
            _require(ok, "eval_batch_size", self, "at least 1, or None")
        _require(_is_int(self.workers) and self.workers >= 0, "workers", self, "0 or more")
        _require(_is_int(self.pad) and self.pad >= 0, "pad", self, "0 or more")
        _require(
            _is_int(self.max_corrupt) and self.max_corrupt >= 0, "max_corrupt", self, "0 or more"
        )
        for name in ("flip", "random_erasing", "mix_prob", "mix_switch_prob"):
            _require(0 <= getattr(self, name) <= 1, name, self, "a probability from 0 to 1")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            ok = math.isfinite(value) and value >= 0
            _require(ok, name, self, "0 (off) or a positive number")
        _one_of("mix_mode", self.mix_mode, ("batch",))
        ok = self.rand_augment is None or 0 <= self.rand_augment <= 10
        _require(ok, "rand_augment", self, "a magnitude from 0 to 10, or None")
        _require(self.rand_augment_std >= 0, "rand_augment_std", self, "0 or more")
        _require(self.colour_jitter >= 0, "colour_jitter", self, "0 or more")
        _require(0 < self.eval_crop <= 1, "eval_crop", self, "more than 0 and at most 1")
        ordered = len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        _require(ordered, "crop_scale", self, "lowest and highest share, within 0 to 1")
        ordered = len(self.crop_aspect) == 2 and 0 < self.crop_aspect[0] <= self.crop_aspect[1]
        _require(ordered, "crop_aspect", self, "lowest and highest positive ratio")
        for name in ("mean", "std"):
            values = getattr(self, name)
            ok = len(values) == self.channels and all(math.isfinite(v) for v in values)
            if name == "std":
                ok = ok and all(v > 0 for v in values)
            _require(ok, name, self, f"{self.channels} numbers, one per channel")

        if self.resident:
            self._check_resident()

    def _check_resident(self) -> None:
        """Resident images are augmented on the device, which knows crop and flip only."""
        _require(
            self.crop != "random_resized", "crop", self, "pad_shift or resize if resident=True"
        )
        _require(self.rand_augment is None, "rand_augment", self, "None if resident=True")
        _require(not self.colour_jitter, "colour_jitter", self, "0 if resident=True")

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        if isinstance(self.image_size, tuple):
            return self.image_size[0], self.image_size[-1]
        return self.image_size, self.image_size


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fail(name: str, value: object, expected: str) -> None:
    raise UserError(f"data.{name} is {value!r}, but must be {expected}.")


def _require(ok: bool, name: str, config: DataConfig, expected: str) -> None:
    if not ok:
        _fail(name, getattr(config, name), expected)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        _fail(
            name,
            value,
            f"one of {', '.join(map(str, choices))}" + suggest(str(value), map(str, choices)),
        )

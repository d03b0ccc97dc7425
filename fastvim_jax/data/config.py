"""Settings that every task's data share: what to read, how to decode it and how to batch it.

A task's own settings (crops, augmentation) are a subclass beside its pipeline, as in `classification_config.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from fastvim_jax.config_checks import MOST, NonNegativeInt, PositiveInt, check_fields
from fastvim_jax.data.sources import SOURCES
from fastvim_jax.errors import UserError, suggest

Workers = Annotated[int, Interval(ge=0, le=1024)]
Level = Annotated[int, Interval(ge=0, le=255)]
PerChannel = tuple[Annotated[float, Interval(ge=-1e6, le=1e6)], ...]
PositivePerChannel = tuple[Annotated[float, Interval(ge=1e-6, le=1e6)], ...]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data of any task. Every value is a plain number, string or tuple, so it goes through JSON.

    Raises:
        UserError: on construction, for an impossible value; the message names the field.
    """

    sources: ClassVar[tuple[str, ...]] = SOURCES
    """The sources that `source` may name."""

    source: str = "digits"
    """Where records come from: digits, packed_npz, image_folder, webdataset, array_record (what `fastvim data prepare`
    writes), pixels (what it writes with --pixels), hugging_face (Parquet files or class folders) or tfds."""
    path: str = ""
    """The data set's folder; `~` and environment variables such as $FASTVIM_DATA_DIR are expanded. tfds: a prepared
    folder, or a set's name in $TFDS_DATA_DIR. Unused by digits."""
    train_split: str = "train"
    """Split to train on: the file `<split>.npz` (packed_npz), the folder `<split>` (image_folder), the shards
    `<split>*.tar` (webdataset) or `<split>-*.parquet` (hugging_face), or the set's own name. A slice behind it takes
    a part of its records: train[5000:], counted in the source's own order (an image_folder's is by class); train[1/10]
    takes one record in ten of each class, train[-1/10] all others."""
    eval_split: str = "test"
    """Split to evaluate on; a slice as above: train[:5000]."""
    class_list: str = ""
    """Class list (.txt: one name a line; .tsv: label, folder, name) where the folder's own is not the right one."""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """Side, or height and width, of the model's input in pixels."""
    channels: PositiveInt = 3
    """Channels of the model's input."""
    batch_size: PositiveInt = 128
    """Images a training step takes, over all processes."""
    eval_batch_size: PositiveInt | None = None
    """Images an evaluation step takes, over all processes; None: batch_size."""
    workers: Workers = 0
    """Worker processes that decode and augment; 0: threads of this process. Never changes the batches."""
    decoder: Literal["auto", "pillow", "turbo"] = "auto"
    """turbo: libjpeg-turbo and a SIMD resizer (the extra `data`), several times faster, for upright colour JPEG files;
    pillow: Pillow for everything; auto: turbo if it is installed. Their pixels differ by rounding; see `turbo.py`."""
    background: Level = 255
    """Grey level that transparent pixels are laid on: 0 is black, 255 white."""
    follow_links: bool = False
    """Read what links in the data set's folder point to outside it; without, such a link is an error."""
    mean: PerChannel = IMAGENET_MEAN
    """Subtracted per channel, on a pixel scale of 0 to 1."""
    std: PositivePerChannel = IMAGENET_STD
    """Divides per channel, on a pixel scale of 0 to 1."""
    max_corrupt: NonNegativeInt = 0
    """Undecodable training records replaced by others (and counted) before the run stops; 0: the first one stops it."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        if self.source not in self.sources:
            raise UserError(
                f"data.source {self.source!r} is not known: use one of {', '.join(self.sources)}."
                + suggest(self.source, self.sources)
            )
        if self.source != "digits" and not self.path:
            raise UserError(f"data.path is empty: the source {self.source!r} needs its folder.")
        self._check_statistics()

    def _check_statistics(self) -> None:
        for name in ("mean", "std"):
            expected = f"{self.channels} numbers, one per channel"
            self._require(len(getattr(self, name)) == self.channels, name, expected)

    def resolved(self) -> Any:
        """Return the config with everything filled in that is stored with the data; here it is complete already."""
        return self

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        if isinstance(self.image_size, tuple):
            return self.image_size[0], self.image_size[-1]
        return self.image_size, self.image_size

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise UserError(f"data.{name} is {getattr(self, name)!r}, but must be {expected}.")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        self._require(least <= value <= MOST, name, f"a whole number of at least {least}")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        hint = suggest(str(value), choices)
        self._require(value in choices, name, f"one of {', '.join(choices)}" + hint.rstrip("."))

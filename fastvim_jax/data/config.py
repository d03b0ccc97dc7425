"""Define the data settings that all tasks share: what to read, how to decode it, and how to batch it.

A task's own settings (crops, augmentation) are a subclass beside its pipeline, as in `classification_config.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from fastvim_jax.config_checks import NonNegativeInt, PositiveInt, check_fields
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
    """Data settings of any task. Every value is a number, a string or a tuple, so that JSON can hold it.

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
    """Split to train on: the file `<split>.npz` (packed_npz), the folder `<split>` (image_folder; `.`: the whole data
    folder, where it holds class folders alone), the shards `<split>*.tar` (webdataset) or `<split>-*.parquet`
    (hugging_face), or the name of a TFDS split. A slice after the name takes a part of the records: train[5000:] counts
    in the order of the source (in an image_folder, class by class); train[1/10] takes one record in ten of each class,
    train[-1/10] all others."""
    eval_split: str = "test"
    """Split to evaluate on; a slice as above: train[:5000]."""
    class_list: str = ""
    """A class list to use instead of the folder's own. .txt: one name per line; .tsv: label, folder, name."""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """Height and width of the model's input in pixels (one number: square)."""
    channels: PositiveInt = 3
    """Channels of the model's input."""
    batch_size: PositiveInt = 128
    """Images per training step, over all processes."""
    eval_batch_size: PositiveInt | None = None
    """Images per evaluation step, over all processes; None: batch_size."""
    workers: Workers = 0
    """Worker processes that decode and augment; 0: threads of this process. The batches are the same for any number."""
    decoder: Literal["auto", "pillow", "turbo"] = "auto"
    """turbo: libjpeg-turbo and a SIMD resizer for upright colour JPEG files, several times faster (install the extra
    `data`); pillow: Pillow for all files; auto: turbo if it is installed. Their pixels differ by rounding."""
    background: Level = 255
    """Grey level behind transparent pixels: 0 is black, 255 white."""
    follow_links: bool = False
    """Read files outside the data set's folder that links in it lead to. Otherwise such a link is an error."""
    mean: PerChannel = IMAGENET_MEAN
    """Mean of each channel, subtracted from pixels scaled to 0 to 1."""
    std: PositivePerChannel = IMAGENET_STD
    """Standard deviation of each channel, for pixels scaled to 0 to 1. Pixels minus the mean are divided by it."""
    max_corrupt: NonNegativeInt = 0
    """Largest number of undecodable training records. Each is counted and replaced by another; one more stops the
    run."""

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
            expected = f"{self.channels} numbers, one for each of data.channels"
            self._require(len(getattr(self, name)) == self.channels, name, expected)

    def resolved(self) -> Any:
        """Return the config, completed by what is stored with the data. Here nothing is stored there."""
        return self

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        if isinstance(self.image_size, tuple):
            return self.image_size[0], self.image_size[-1]
        return self.image_size, self.image_size

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run says of these settings at its start."""
        return ()

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise UserError(f"data.{name} is {getattr(self, name)!r}, but must be {expected}.")


def one_split_note(config: DataConfig, name: str) -> tuple[str, ...]:
    """Say in one line that evaluation reads what training reads, because of the splits or of the pattern `name`."""
    if "{split}" not in getattr(config, name):
        cause = f"data.{name} has no {{split}}"
    elif config.train_split == config.eval_split:
        cause = f"data.train_split and data.eval_split are both {config.train_split!r}"
    else:
        return ()
    return (
        f"{cause}: evaluation reads what training reads, so its scores tell nothing about new images.",
    )

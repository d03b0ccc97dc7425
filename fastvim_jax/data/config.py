"""Settings that every task's data share: what to read, how to decode it and how to batch it.

A task's own settings (crops, augmentation) are a subclass beside its pipeline, as in `classification_config.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from fastvim_jax.data.sources import SOURCES
from fastvim_jax.errors import UserError, suggest

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
    channels: int = 3
    """Channels of the model's input."""
    batch_size: int = 128
    """Images a training step takes, over all processes."""
    eval_batch_size: int | None = None
    """Images an evaluation step takes, over all processes; None: batch_size."""
    workers: int = 0
    """Worker processes that decode and augment; 0: threads of this process. Never changes the batches."""
    decoder: Literal["auto", "pillow", "turbo"] = "auto"
    """turbo: libjpeg-turbo and a SIMD resizer (the extra `data`), several times faster, for upright colour JPEG files;
    pillow: Pillow for everything; auto: turbo if it is installed. Their pixels differ by rounding; see `turbo.py`."""
    background: int = 255
    """Grey level that transparent pixels are laid on: 0 is black, 255 white."""
    follow_links: bool = False
    """Read what links in the data set's folder point to outside it; without, such a link is an error."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted per channel, on a pixel scale of 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divides per channel, on a pixel scale of 0 to 1."""
    max_corrupt: int = 0
    """Undecodable training records replaced by others (and counted) before the run stops; 0: the first one stops it."""

    def __post_init__(self) -> None:
        if self.source not in self.sources:
            raise UserError(
                f"data.source {self.source!r} is not known: use one of {', '.join(self.sources)}."
                + suggest(self.source, self.sources)
            )
        if self.source != "digits" and not self.path:
            raise UserError(f"data.path is empty: the source {self.source!r} needs its folder.")
        self._one_of("decoder", ("auto", "pillow", "turbo"))
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        sound = len(sizes) in (1, 2) and all(_is_int(s) and s >= 1 for s in sizes)
        self._require(sound, "image_size", "a positive side, or height and width")
        self._whole("channels", 1)
        self._whole("batch_size", 1)
        if self.eval_batch_size is not None:
            self._whole("eval_batch_size", 1, " or None")
        self._whole("workers", 0)
        self._whole("max_corrupt", 0)
        ok = _is_int(self.background) and 0 <= self.background <= 255
        self._require(ok, "background", "a grey level from 0 to 255")
        self._check_statistics()

    def _check_statistics(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            ok = len(values) == self.channels and all(math.isfinite(v) for v in values)
            if name == "std":
                ok = ok and all(v > 0 for v in values)
            self._require(ok, name, f"{self.channels} numbers, one per channel")

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

    def _whole(self, name: str, least: int, otherwise: str = "") -> None:
        value = getattr(self, name)
        expected = f"a whole number of at least {least}{otherwise}"
        self._require(_is_int(value) and value >= least, name, expected)

    def _one_of(self, name: str, choices: tuple[object, ...]) -> None:
        value, texts = getattr(self, name), [str(choice) for choice in choices]
        hint = suggest(str(value), texts)
        if value not in choices:
            raise UserError(
                f"data.{name} is {value!r}, but must be one of {', '.join(texts)}.{hint}"
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""`fastvim bench data PATH`: images per second of each stage, of the whole pipeline, and of a PyTorch DataLoader."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.usage import UsageError, as_usage_error, parse


@dataclasses.dataclass(frozen=True)
class Data:
    """Measure how fast images are read.

    Single stages and the whole pipeline are measured in processor time: images per second of one core, independent of
    other programs. With worker processes, time is measured by the clock, after they have started.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The data set's folder, as for `fastvim data check`."""
    source: str = "auto"
    """Which kind of data set it is; auto looks at the folder."""
    split: str = "train"
    """Split to read."""
    class_list: str = ""
    """A class list to use instead of the folder's own."""
    image_size: int = 224
    """Side of the crops in pixels."""
    batch_size: int = 32
    """Images per batch."""
    augment_on: Literal["host", "device"] = "host"
    """As data.augment_on: with device, the host only crops, and shards of pixels are cropped on the device, too."""
    rand_augment: float | None = None
    """RandAugment's magnitude in the whole pipeline; None: crop and flip only."""
    workers: tuple[int, ...] = ()
    """Also measure with these numbers of worker processes."""
    seconds: float = 2.0
    """Approximate duration of each measurement."""
    json: Path | None = None
    """Write all rows to this file, with device, versions and commit."""


def data(arguments: Sequence[str]) -> int:
    """Measure how fast images are read."""
    chosen = parse(Data, "bench data", arguments, f"{Data.__doc__}")
    if chosen.seconds <= 0 or any(count < 1 for count in chosen.workers):
        raise UsageError("--seconds must be positive, and --workers at least 1 each.")
    from fastvim_jax.bench.data import measure
    from fastvim_jax.bench.record import show
    from fastvim_jax.data import ClassificationData
    from fastvim_jax.data.sources.layout import guess_source

    with as_usage_error():
        kind = guess_source(chosen.path) if chosen.source == "auto" else chosen.source
        config = ClassificationData(
            source=kind,
            path=chosen.path,
            train_split=chosen.split,
            class_list=chosen.class_list,
            image_size=chosen.image_size,
            batch_size=chosen.batch_size,
            rand_augment=chosen.rand_augment,
            augment_on=chosen.augment_on,
        )
    rows = measure(config, seconds=chosen.seconds, workers=chosen.workers)
    command = shlex.join(["fastvim", "bench", "data", *arguments])
    found = show("data", rows, _COLUMNS, command=command, file=chosen.json)
    for row in found:
        if "ours_is_faster" in row:
            print(f"whole against {row['what']}: {row['ours_is_faster']:.2f} times as fast")
    return 0


def _number(row: dict[str, Any], key: str, digits: int) -> str:
    return f"{row[key]:,.{digits}f}" if key in row else ""


_COLUMNS = (
    ("stage", 34, lambda row: row["what"]),
    ("decoder", 8, lambda row: row["with"]),
    ("ms/image", 10, lambda row: _number(row, "milliseconds", 3)),
    ("images/s per core", 16, lambda row: _number(row, "per_core", 0)),
    ("images/s", 9, lambda row: _number(row, "per_second", 0)),
)

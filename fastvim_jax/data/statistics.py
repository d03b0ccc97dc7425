"""Compute mean and standard deviation of a data set's channels once, and store them beside the data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json

FILE = "statistics.json"


@dataclass(frozen=True)
class Statistics:
    """Hold the channels' statistics over all pixels of all images, on a pixel scale of 0 to 1.

    Attributes:
        names: names of the channels.
        mean: mean of each channel.
        std: standard deviation of each channel.
        images: number of images counted.
        skipped: names of images that could not be decoded.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    skipped: tuple[str, ...] = ()


def count_statistics(
    images: Iterable[np.ndarray], names: Sequence[str], skipped: Sequence[str] = ()
) -> Statistics:
    """Compute the statistics of uint8 images `h w c`. Sums are integers, so the order of images does not matter.

    Raises:
        UserError: there is no image, an image has another number of channels, or a channel has one value everywhere.
    """
    count, pixels = 0, 0
    total = np.zeros(len(names), np.int64)
    squares = np.zeros(len(names), np.int64)
    for image in images:
        if image.shape[-1] != len(names):
            raise UserError(
                f"an image has {image.shape[-1]} channels, but {len(names)} are named: {', '.join(names)}."
            )
        flat = image.reshape(-1, len(names)).astype(np.int64)
        total += flat.sum(axis=0)
        squares += (flat * flat).sum(axis=0)
        pixels += len(flat)
        count += 1
    if not count:
        raise UserError("there is no image to count: check the folder and the split.")
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0.0))
    if constant := [name for name, value in zip(names, std, strict=True) if value == 0]:
        raise UserError(
            f"channel {', '.join(constant)} has the same value everywhere: leave it out, or check its files."
        )
    return Statistics(
        tuple(names),
        tuple(float(v) for v in mean / 255),
        tuple(float(v) for v in std / 255),
        count,
        tuple(skipped),
    )


def write_statistics(folder: Path, statistics: Statistics) -> Path:
    """Write `statistics.json` into a data set's folder and return the file."""
    file = folder / FILE
    file.write_text(json.dumps(statistics.__dict__, indent=1) + "\n", encoding="utf-8")
    return file


def read_statistics(
    folder: Path, names: Sequence[str], path: str = ""
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and deviation of the channels `names`, in this order, from a data set's folder.

    Errors name the command that counts them; `path` is what it is to be given, by default the folder.

    Raises:
        UserError: there is no folder or no file, it is damaged, or it lacks one of the channels.
    """
    if not folder.exists():
        raise UserError(f"{str(folder)!r} does not exist (data.path).")
    file = (folder if folder.is_dir() else folder.parent) / FILE
    count = shlex.join(("fastvim", "data", "stats", path or str(folder), "--channels", *names))
    command = f"count it with `{count}`, or set data.mean and data.std"
    if not file.is_file():
        raise UserError(f"{str(file)!r} does not exist: {command}.")
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        mean = dict(zip(content["names"], content["mean"], strict=True))
        std = dict(zip(content["names"], content["std"], strict=True))
        found = [float(mean[name]) for name in names], [float(std[name]) for name in names]
    except KeyError as error:
        raise UserError(f"{str(file)!r} has no channel or entry {error}: {command}.") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{str(file)!r} is damaged ({error}): {command}.") from None
    return tuple(found[0]), tuple(found[1])

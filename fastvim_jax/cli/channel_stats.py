"""`fastvim data stats PATH --channels NAME...`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from fastvim_jax.cli.usage import UsageError, as_usage_error, parse
from fastvim_jax.errors import UserError, counted

_DIM = 32
"""Level that pixels of 8 bits should reach: from a 12-bit camera, in 16 bits, they reach 16."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The data to count."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The data set's folder, or a naming pattern: fields/{split}/{class}/{well}_s{site}_{channel}.tif."""
    channels: tuple[str, ...]
    """Names of the channels in their order."""
    source: str = "auto"
    """Kind of the data set, as in data.source; auto: found out from the folder."""
    split: str = "train"
    """Split to count."""
    class_list: str = ""
    """A class list, or folder of plate maps, to use instead of the data set's own."""
    follow_links: bool = False
    """Read files outside the folder that links in it lead to."""
    every: int = 1
    """Read only every N-th image."""


def run(arguments: Sequence[str]) -> int:
    """Count mean and deviation of every channel, and store them with the data, where training takes them from."""
    chosen = parse(Arguments, "data stats", arguments, f"{run.__doc__}")
    from fastvim_jax.data import DecodeError, open_source
    from fastvim_jax.data.multichannel import (
        axes_hint,
        in_order,
        read_channels,
        spelled_as,
        to_uint8,
    )
    from fastvim_jax.data.records import read_record
    from fastvim_jax.data.sources import data_folder
    from fastvim_jax.data.sources.layout import guess_source
    from fastvim_jax.data.statistics import count_statistics, write_statistics

    with as_usage_error():
        if chosen.every < 1:
            raise UsageError(f"--every {chosen.every} must be at least 1.")
        if not chosen.channels or len(set(chosen.channels)) < len(chosen.channels):
            raise UsageError("--channels: name each channel once, in their order.")
        kind = guess_source(chosen.path) if chosen.source == "auto" else chosen.source
        source = open_source(
            kind,
            chosen.split,
            path=chosen.path,
            class_list=chosen.class_list,
            follow_links=chosen.follow_links,
            channels=chosen.channels,
        )
    stored = tuple(getattr(source, "channel_names", ()))
    if stored and stored != chosen.channels:
        raise UsageError(
            f"the images hold the channels {', '.join(stored)}: give these names, in this order, to --channels."
        )
    skipped: list[str] = []
    unknown: set[tuple[str, ...]] = set()
    highest = np.zeros(len(chosen.channels), np.uint8)

    def images() -> Iterator[Any]:
        for index in range(0, len(source), chosen.every):
            try:
                record = read_record(source, index)
                image = read_channels(record.image, record.name)
                pixels = in_order(image, chosen.channels, record.name)
                if pixels.shape[-1] != len(chosen.channels):
                    found = counted(pixels.shape[-1], "channel")
                    raise DecodeError(
                        f"{record.name}: {found}, but --channels names {len(chosen.channels)}."
                        f"{axes_hint(pixels, len(chosen.channels))}"
                    )
                if not set(spelled_as(image.names, chosen.channels)) & set(chosen.channels):
                    unknown.add(image.names)
                eight_bits = to_uint8(pixels)
                np.maximum(highest, eight_bits.max(axis=(0, 1)), out=highest)
                yield eight_bits
            except DecodeError as error:
                skipped.append(str(error))

    try:
        statistics = count_statistics(images(), chosen.channels, skipped)
    except UserError as error:
        shown = "".join(f"\n  left out: {reason}" for reason in skipped[:5])
        more = f"\n  ... and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise UserError(f"{error}{shown}{more}") from None
    for name, mean, std in zip(statistics.names, statistics.mean, statistics.std, strict=True):
        print(f"{name}: mean {mean:.5f}, deviation {std:.5f} (pixels from 0 to 1)")
    if dim := [n for n, most in zip(statistics.names, highest, strict=True) if most < _DIM]:
        print(
            f"  note: in 8 bits no pixel of {', '.join(dim)} is above {highest[highest < _DIM].max()} of 255, so few "
            "levels are left. 16-bit pixels are divided by 257: multiply those of a 12-bit camera by 16 in the files."
        )
    for names in sorted(unknown - {()}):
        print(
            f"  note: there are files whose channels are called {', '.join(names)}, none of which --channels names: "
            "they are taken in their order in the file."
        )
    for reason in skipped:
        print(f"  left out: {reason}")
    counted_images = f"{counted(statistics.images, 'image')} of {chosen.split}"
    if "://" in chosen.path:
        given = [" ".join(map(str, each)) for each in (statistics.mean, statistics.std)]
        print(f"{counted_images}. Nothing is stored at a URL; train with")
        print(f"  --data.mean {given[0]} --data.std {given[1]}")
        return 0
    folder = data_folder(chosen.path)
    file = write_statistics(folder if folder.is_dir() else folder.parent, statistics)
    print(f"{file}: {counted_images}")
    return 0

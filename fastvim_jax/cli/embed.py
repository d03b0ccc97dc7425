"""`fastvim embed RUN PATH... --out features.parquet`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvim_jax.cli.usage import UsageError, parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to embed with what."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a run on images of many channels, or of a saved model of such images."""
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files of all channels (.npy, TIFF), or with --pattern folders of one file a channel."""
    out: Path = Path("features.parquet")
    """The table: .parquet or .csv."""
    pattern: str | None = None
    """Names of the files below a folder, for example "{plate}_{well}_s{site}/ch{}_{channel}.png"; the fields in braces
    become columns, {} matches anything."""
    channels: tuple[str, ...] = ()
    """The model's channels to use; by default all that an image has."""
    rename: tuple[str, ...] = ()
    """A file's channel as the model calls it: DAPI=DNA."""
    per: Literal["tile", "site", "well"] = "site"
    """What a row is: a tile of the model's input size, the mean over a site's tiles, or over a well's sites."""
    controls: tuple[str, ...] = ()
    """Control wells: features become robust z-scores, by median and median absolute deviation of each plate's
    controls."""
    depth: Literal["full", "percentile"] = "full"
    """16-bit pixels to 8 bits: full divides by 257; percentile stretches each channel of each image."""
    plot: Path | None = None
    """Draw the first two principal components to this PNG file."""
    colour: str = "well"
    """The column that colours the plot."""
    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, if the run kept one."""
    batch_size: int = 32
    """Tiles at a time."""


def run(arguments: Sequence[str]) -> int:
    """Embed microscope fields with a trained run, and write one row a site with its plate, well and site.

    A field that cannot be read is reported and the others are embedded; the exit status is then 1.
    """
    chosen = parse(Arguments, "embed", arguments, f"{run.__doc__}")
    if not chosen.paths:
        raise UsageError("name an image file or a folder: fastvim embed RUN PATH...")
    pairs = [pair.partition("=") for pair in chosen.rename]
    if wrong := [
        text for text, (a, _, b) in zip(chosen.rename, pairs, strict=True) if not (a and b)
    ]:
        raise UsageError(f"--rename {wrong[0]!r}: write FILE_CHANNEL=MODEL_CHANNEL.")
    from fastvim_jax.inference.channel_model import load_channel_model
    from fastvim_jax.inference.embed import (
        draw_embeddings,
        embed_fields,
        find_fields,
        normalise_to_controls,
    )

    model, data = load_channel_model(chosen.run, weights=chosen.weights)
    table = embed_fields(
        model,
        data,
        find_fields(chosen.paths, chosen.pattern),
        channels=chosen.channels or None,
        rename={a: b for a, _, b in pairs},
        level=chosen.per,
        depth=chosen.depth,
        batch_size=chosen.batch_size,
    )
    if chosen.controls:
        table = normalise_to_controls(table, chosen.controls)
    table.write(chosen.out)
    print(
        f"{chosen.out}: {table.features.shape[0]} rows of {table.features.shape[1]} features, "
        f"columns {', '.join(table.metadata)}"
    )
    if chosen.plot:
        draw_embeddings(table, chosen.colour, chosen.plot)
        print(f"{chosen.plot}: the first two principal components by {chosen.colour}")
    for problem in table.problems:
        print(f"left out: {problem}", file=sys.stderr)
    return int(bool(table.problems))

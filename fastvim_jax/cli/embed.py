"""`fastvim embed RUN PATH... --out features.parquet`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.usage import UsageError, as_usage_error, parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to embed with what."""

    run: Annotated[str, tyro.conf.Positional]
    """The folder of a run, a folder of `save_pretrained`, or hf://owner/name."""
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Photographs: files, folders, tar files, patterns in quotes, or @FILE with one name a line. Microscope images:
    files of all channels (.npy, TIFF), or with --pattern folders of one file a channel."""
    out: Path = Path("features.parquet")
    """The table: .parquet or .csv."""
    pattern: str | None = None
    """Names of the files below a folder, for example "{plate}_{well}_s{site}/ch{}_{channel}.png"; the fields in braces
    become columns, {} matches anything."""
    channels: tuple[str, ...] = ()
    """The model's channels to use; by default all that an image has."""
    rename: tuple[str, ...] = ()
    """A file's channel as the model calls it: DAPI=DNA."""
    per: Literal["tile", "site", "well"] | None = None
    """What a row of microscope images is: a tile of the model's input size, the mean over a site's tiles, or over a
    well's sites. By default a site."""
    controls: tuple[str, ...] = ()
    """Control wells: features become robust z-scores, by median and median absolute deviation of each plate's
    controls."""
    depth: Literal["full", "percentile"] | None = None
    """16-bit pixels of microscope images to 8 bits: full, the default, divides by 257; percentile stretches each
    channel of each image."""
    plot: Path | None = None
    """Draw the first two principal components to this PNG file."""
    colour: str | None = None
    """The column that colours the plot. By default the well; photographs have one colour."""
    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, if the run kept one."""
    batch_size: int = 32
    """Tiles at a time."""


def run(arguments: Sequence[str]) -> int:
    """Embed images with a trained model: a row a photograph, or of microscope fields a row a site with plate and well.

    An image that cannot be read is reported and the others are embedded; the exit status is then 1.
    """
    chosen = parse(Arguments, "embed", arguments, f"{run.__doc__}")
    if not chosen.paths:
        raise UsageError("name an image file or a folder: fastvim embed RUN PATH...")
    pairs = [pair.partition("=") for pair in chosen.rename]
    if wrong := [
        text for text, (a, _, b) in zip(chosen.rename, pairs, strict=True) if not (a and b)
    ]:
        raise UsageError(f"--rename {wrong[0]!r}: write FILE_CHANNEL=MODEL_CHANNEL.")
    from fastvim_jax.inference.channel_model import has_channels, load_channel_model

    if not has_channels(chosen.run):
        return _photographs(chosen)
    from fastvim_jax.inference.embed import (
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
        level=chosen.per or "site",
        depth=chosen.depth or "full",
        batch_size=chosen.batch_size,
    )
    if chosen.controls:
        table = normalise_to_controls(table, chosen.controls)
    return _written(table, chosen, chosen.colour or "well")


def _photographs(chosen: Arguments) -> int:
    """Embed photographs while a bar shows how far they are."""
    from rich.console import Console
    from rich.progress import track

    from fastvim_jax.inference.classifier import Classifier
    from fastvim_jax.inference.embed import embed_images
    from fastvim_jax.inference.image_files import find_images

    for name in ("pattern", "channels", "rename", "controls", "per", "depth"):
        if getattr(chosen, name):
            raise UsageError(f"--{name} is of microscope images; {chosen.run} reads photographs.")
    with as_usage_error():
        files = find_images(chosen.paths)
    size = min(chosen.batch_size, len(files))
    classifier = Classifier.load(chosen.run, weights=chosen.weights, batch_size=size)
    console = Console(stderr=True)
    table = embed_images(
        classifier,
        files,
        follow=lambda parts: track(
            parts, "embedding", console=console, disable=not console.is_terminal
        ),
    )
    return _written(table, chosen, chosen.colour)


def _written(table: Any, chosen: Arguments, colour: str | None) -> int:
    """Write the table and the plot, report what was left out, and return the exit status."""
    from fastvim_jax.inference.embed import draw_embeddings

    table.write(chosen.out)
    print(
        f"{chosen.out}: {table.features.shape[0]} rows of {table.features.shape[1]} features, "
        f"columns {', '.join(table.metadata)}"
    )
    if chosen.plot:
        draw_embeddings(table, colour, chosen.plot)
        print(f"{chosen.plot}: the first two principal components")
    for problem in table.problems:
        print(f"left out: {problem}", file=sys.stderr)
    return int(bool(table.problems))

"""`fastvim embed RUN PATH... --out features.parquet`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.records import write_results
from fastvim_jax.cli.usage import UsageError, as_usage_error, parse, require_picture
from fastvim_jax.errors import counted, suggest


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The images to embed, the model, and the table to write."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, a folder of `save_pretrained`, or hf://owner/name."""
    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Photographs: files, folders, tar files, patterns in quotes, or @FILE with one name per line. Microscope images:
    files of all channels (.npy, TIFF); a plate's load_data.csv or Parquet index, also at a URL, or its folder; or with
    --pattern any folder."""
    out: Path = Path("features.parquet")
    """The table to write: .parquet or .csv; for photographs also .jsonl. After an interruption the same command
    continues. A complete table of microscope images is not replaced."""
    pattern: str | None = None
    """Pattern of the file names below a folder, for example "{plate}_{well}_s{site}/ch{}_{channel}.png". Fields in
    braces become columns; {} matches anything. Without {channel}, each file holds all channels."""
    channels: tuple[str, ...] = ()
    """Channels of the model to use; by default all that an image has."""
    rename: tuple[str, ...] = ()
    """Which channel of the model a file's channel is: DAPI=DNA."""
    per: Literal["tile", "site", "well"] | None = None
    """What each row describes, for microscope images: a tile of the model's input size; a site: the mean over its tiles
    (default); a well: the mean over its sites."""
    controls: tuple[str, ...] = ()
    """Names of control wells. Features become robust z-scores: median and median absolute deviation are those of the
    controls on the same plate."""
    depth: Literal["full", "percentile"] | None = None
    """How 16-bit pixels of microscope images become 8 bits: full (default) divides by 257; percentile stretches each
    channel of each image."""
    plot: Path | None = None
    """Draw the first two principal components to this PNG file."""
    colour: str | None = None
    """Column that colours the points of the plot; by default the well if there is one, else one colour."""
    weights: Literal["raw", "ema"] | None = None
    """The trained weights or their average; by default the average, or what scored better in the run's log."""
    batch_size: int = 32
    """Images, or tiles of microscope images, per batch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype for photographs, with the model's own activations. By default the model's own dtype; on a GPU
    its fast mode, in bfloat16."""
    workers: int | None = None
    """Processes that decode photographs; 0: threads of this process. By default one per core, at most 16, for 5,000
    files or more, and threads for fewer."""


def run(arguments: Sequence[str]) -> int:
    """Embed images with a trained model and write a table: one row per photograph, or per site of microscope images.

    Images that cannot be read are reported and left out; the exit status is then 1.
    """
    chosen = parse(Arguments, "embed", arguments, f"{run.__doc__}")
    if not chosen.paths:
        raise UsageError("name an image file or a folder: fastvim embed RUN PATH...")
    pairs = [pair.partition("=") for pair in chosen.rename]
    if wrong := [
        text for text, (a, _, b) in zip(chosen.rename, pairs, strict=True) if not (a and b)
    ]:
        raise UsageError(f"--rename {wrong[0]!r}: write FILE_CHANNEL=MODEL_CHANNEL.")
    require_picture(chosen.plot)
    from fastvim_jax.inference.channel_model import has_channels, load_channel_model

    if not has_channels(chosen.run):
        return _photographs(chosen)
    if chosen.dtype:
        raise UsageError(f"--dtype is of photographs; {chosen.run} reads microscope images.")
    from fastvim_jax.inference.embed import embed_fields
    from fastvim_jax.inference.embedding_table import (
        ADDED,
        normalise_to_controls,
        require_controls,
        require_table,
    )
    from fastvim_jax.inference.fields import find_fields, require_renamed
    from fastvim_jax.inference.row_files import reserved

    with as_usage_error():
        if chosen.batch_size < 1:
            raise UsageError(f"--batch-size {chosen.batch_size} must be at least 1")
        require_table(chosen.out)
        _refuse_complete(chosen.out)
    fields = find_fields(chosen.paths, chosen.pattern, note=_note)
    rename = {a: b for a, _, b in pairs}
    require_renamed(fields, rename)
    _require_colour(chosen, {key for field in fields for key in field.metadata} | set(ADDED))
    if chosen.controls:  # Said before all images are read.
        rows = [(field.metadata.get("plate", ""), field.metadata.get("well")) for field in fields]
        rows = list(dict.fromkeys(rows)) if chosen.per == "well" else rows
        rows = 2 * rows if chosen.per == "tile" else rows  # A field has at least one tile.
        of_wells = [(plate, well) for plate, well in rows if well is not None]
        require_controls([w for _, w in of_wells], [p for p, _ in of_wells], chosen.controls)
    with reserved(chosen.out):
        _refuse_complete(chosen.out)  # again: another command may have finished it meanwhile
        model, data = load_channel_model(chosen.run, weights=chosen.weights)
        table = embed_fields(
            model,
            data,
            fields,
            channels=chosen.channels or None,
            rename=rename,
            level=chosen.per or "site",
            depth=chosen.depth or "full",
            batch_size=chosen.batch_size,
            partial=_partial(chosen.out),
            note=_note,
        )
        if chosen.controls:
            table = normalise_to_controls(table, chosen.controls)
        return _written(table, chosen)


def _refuse_complete(out: Path) -> None:
    if out.exists() and not _partial(out).exists():
        raise UsageError(
            f"{out} exists, and another table would replace it: name another file with --out, or delete it."
        )


def _require_colour(chosen: Arguments, columns: Set[str]) -> None:
    """Refuse a column that the plot could not show, before images are read."""
    if chosen.plot and chosen.colour and chosen.colour not in columns:
        raise UsageError(
            f"--colour {chosen.colour}: there is no such column, but {', '.join(sorted(columns))}."
            f"{suggest(chosen.colour, columns)}"
        )


def _partial(out: Path) -> Path:
    """Return the file that keeps finished fields until the table is written."""
    return out.with_name(f"{out.name}.partial.jsonl")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _photographs(chosen: Arguments) -> int:
    """Embed photographs: write a row for each as it is made, then the plot."""
    from fastvim_jax.inference.classifier import Classifier
    from fastvim_jax.inference.decoding import decoding_workers
    from fastvim_jax.inference.embed import (
        draw_embeddings,
        iter_features,
        photograph_columns,
        read_photographs,
    )
    from fastvim_jax.inference.image_files import find_images

    for name in ("pattern", "channels", "rename", "controls", "per", "depth"):
        if getattr(chosen, name):
            raise UsageError(f"--{name} is of microscope images; {chosen.run} reads photographs.")
    _require_colour(chosen, {"file"})
    with as_usage_error():
        files = find_images(chosen.paths)
    size = min(chosen.batch_size, len(files))
    classifier = Classifier.load(
        chosen.run,
        weights=chosen.weights,
        batch_size=size,
        dtype=chosen.dtype,
        outputs=("embeddings",),
        workers=decoding_workers(len(files), chosen.workers),
    )
    make = functools.partial(iter_features, classifier)
    columns = photograph_columns(classifier)
    made_by = {"model": classifier.fingerprint()}
    status = write_results(files, make, chosen.out, columns, "embedding", made_by)
    if chosen.plot:
        draw_embeddings(read_photographs(chosen.out), chosen.colour, chosen.plot)
        print(f"{chosen.plot}: the first two principal components")
    return status


def _written(table: Any, chosen: Arguments) -> int:
    """Write the table and the plot, report images that were left out, and return the exit status."""
    from fastvim_jax.inference.embed import draw_embeddings
    from fastvim_jax.inference.row_files import forget

    table.write(chosen.out)
    forget(_partial(chosen.out))
    print(
        f"{chosen.out}: {counted(table.features.shape[0], 'row')} of {table.features.shape[1]} features, "
        f"columns {', '.join(table.metadata)}"
    )
    if chosen.plot:
        well = "well" if "well" in table.metadata else None
        draw_embeddings(table, chosen.colour or well, chosen.plot)
        print(f"{chosen.plot}: the first two principal components")
    for problem in table.problems:
        print(f"left out: {problem}", file=sys.stderr)
    return int(bool(table.problems))

"""Embed photographs, one row per file, and microscope images, one row per tile, site or well.

A field of view is cut into tiles of the model's input size. A tile's features are what the model's head reads. The row
of a site is the mean over its tiles, that of a well the mean over its sites. The columns are `Metadata_...` and
`feature_0000`, ..., as pycytominer reads them.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.cells_device import make_preprocess
from fastvim_jax.data.multichannel import Depth
from fastvim_jax.data.records import DecodeError, printable
from fastvim_jax.errors import UserError, counted, require_texts, suggest
from fastvim_jax.inference.classifier import Classifier
from fastvim_jax.inference.embedding_table import (
    PREFIX,
    Embeddings,
    aggregate,
    averaged_over,
    columns_of,
)
from fastvim_jax.inference.fields import Field, read_field
from fastvim_jax.inference.fingerprint import fingerprint
from fastvim_jax.inference.row_files import claim, forget, read_records, write_records
from fastvim_jax.json_text import parse_json
from fastvim_jax.models.channels import channel_inputs

Level = Literal["tile", "site", "well"]
_MOST_NAMED = 20
"""Values with a colour and a line of the legend each; more share a scale of colours."""


@dataclasses.dataclass(frozen=True)
class FieldRows:
    """The rows of one field.

    Attributes:
        key: `Field.key`.
        metadata: of each row.
        features: `rows d`, float32.
    """

    key: str
    metadata: list[dict[str, str]]
    features: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values. Python's floats hold float32 exactly."""
        return {
            "file": self.key,
            "metadata": self.metadata,
            "features": self.features.tolist(),
        }

    def to_rows(self) -> list[list[Any]]:
        """Return a row of key and features for each row of the field."""
        return [[self.key, *row] for row in self.features.tolist()]


def _continued(partial: Path, made_by: Mapping[str, Any]) -> dict[str, FieldRows]:
    """Return the fields that an interrupted call left in a file, and claim the file."""
    claim(partial, made_by)
    try:
        return {
            each["file"]: FieldRows(
                each["file"], each["metadata"], np.array(each["features"], np.float32)
            )
            for each in read_records(partial)
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{partial} holds no fields that could be continued: {error!r}") from None


def embed_fields(
    model: nnx.Module,
    data: CellsData,
    fields: Iterable[Field],
    *,
    channels: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    level: Level = "site",
    depth: Depth = "full",
    batch_size: int = 32,
    partial: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Embeddings:
    """Embed fields. Report unreadable fields in `problems`, and embed the others.

    Args:
        model: a trained model.
        data: the data it was trained on: names of the channels, input size, mean and deviation.
        fields: of any size.
        channels: the model's channels to use, by name; None: all that a field has.
        rename: a file's channel name → the model's, for example {"DAPI": "DNA"}.
        level: what a row is.
        depth: how 16-bit pixels become 8 bits; as the training data were made.
        batch_size: tiles at a time.
        partial: a file that ends in .jsonl. Each field's rows are appended to it, and what an interrupted call left
            there is not computed again. The caller deletes it (`row_files.forget`) once the table is written.
        note: called with how many fields `partial` held, with how many lack channels that others have, and with what
            else than sites wells are averaged over.

    Raises:
        UserError: a channel is not one of the model's, no field could be embedded, or another model or other options
            made `partial`.
    """
    channels = None if channels is None else require_texts(channels, "channels")
    for name in [*(channels or ()), *(rename or {}).values()]:
        if name not in data.names:
            raise UserError(
                f"the model has no channel {name!r}: it knows {', '.join(data.names)}.{suggest(name, data.names)}"
            )
    features_of = _make_features(model, data)
    done: dict[str, FieldRows] = {}
    if partial is not None:
        options = (channels, dict(rename or {}), level == "tile", depth)
        described = repr((model.config, data.names, data.height_width, data.mean, data.std))  # type: ignore[attr-defined]
        digest = fingerprint(described, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        done = _continued(partial, {"model": digest, "set of options": repr(options)})
        if done:
            note(f"{partial}: {counted(len(done), 'field')} embedded before an interruption.")
    keys: list[str] = []
    problems: list[str] = []

    def remaining() -> Iterator[FieldRows]:
        for field in fields:
            if level == "well" and not field.metadata.get("well"):
                # Otherwise all such fields, or a whole plate, would become one row.
                problems.append(f"{field.name}: it has no well; name {{well}} in --pattern.")
                continue
            keys.append(field.key)
            if field.key in done:
                continue
            try:
                pixels, ids = read_field(field, data, channels, rename or {}, depth)
            except DecodeError as error:
                problems.append(str(error))
                continue
            tiles = list(cut_tiles(pixels, data.height_width))
            found = _in_batches(features_of, tiles, ids, batch_size)
            used = {"channels": "+".join(data.names[i] for i in ids)}
            if level == "tile":
                rows = [field.metadata | {"tile": str(i)} | used for i in range(len(tiles))]
                yield FieldRows(field.key, rows, found)
            else:
                row = field.metadata | {"tiles": str(len(tiles))} | used
                yield FieldRows(field.key, [row], found.mean(axis=0)[None])

    new = remaining() if partial is None else write_records(remaining(), partial, {})
    done |= {each.key: each for each in new}
    embedded = [done[key] for key in keys if key in done]
    if not embedded:
        if partial is not None:
            forget(partial)
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError("\n  ".join(["no field could be embedded.", *problems[:20], *more]))
    metadata = columns_of([row for each in embedded for row in each.metadata])
    if text := describe_channels([each.metadata[0]["channels"] for each in embedded]):
        note(text)
    features = np.concatenate([each.features for each in embedded])
    table = Embeddings(metadata, features, tuple(problems))
    if level != "well":
        return table
    if over := averaged_over(table, ("plate", "well")):
        note(
            f"rows are means over {', '.join(over)}, too, which differ within a well: embed these one by one, or with "
            "--per site, if they are to be told apart."
        )
    return aggregate(table, ("plate", "well"))


def describe_channels(channels: Sequence[str]) -> str | None:
    """Say how many fields lack channels that others have, whose features therefore differ; None if all have the same.

    Args:
        channels: of each field, as the column `channels` holds them: DNA+ER.
    """
    sets = [set(text.split("+")) for text in channels]
    every = list(dict.fromkeys(name for text in channels for name in text.split("+")))
    fewer = sum(len(found) < len(every) for found in sets)
    if not fewer:
        return None
    shared = [name for name in every if all(name in found for found in sets)]
    advice = f": --channels {' '.join(shared)} uses what all have" if shared else ""
    return (
        f"{counted(fewer, 'field')} of {len(sets)} had not all of {', '.join(every)} ({PREFIX}channels), so features "
        f"differ for that reason, too{advice}."
    )


@dataclasses.dataclass(frozen=True)
class PhotographFeatures:
    """One photograph's features.

    Attributes:
        file: the file as it was named.
        features: `d`, float32: what the classifier's head reads; empty where the file could not be read.
        error: why there are no features, or None.
    """

    file: str
    features: np.ndarray
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values: `file`, and either `features` or `error`."""
        if self.error is not None:
            return {"file": printable(self.file), "error": self.error}
        return {"file": printable(self.file), "features": self.features.tolist()}

    def to_rows(self) -> list[list[Any]]:
        """Return a row of `photograph_columns`; none for a file that could not be read."""
        return [] if self.error is not None else [[printable(self.file), *self.features.tolist()]]


def photograph_columns(classifier: Classifier) -> dict[str, str]:
    """Return the columns of a table of photographs: name and Arrow type."""
    names = [f"feature_{i:04}" for i in range(classifier.num_features)]
    return {f"{PREFIX}file": "string", **dict.fromkeys(names, "float32")}


def iter_features(
    classifier: Classifier, files: Sequence[str | Path] | str | Path
) -> Iterator[PhotographFeatures]:
    """Embed any number of photographs, and yield each one's features as soon as its part of the files is done.

    Args:
        classifier: see `Classifier.load`.
        files: image files of any size and kind that `predict` reads.
    """
    for file, i, result in classifier.each_file(files):
        error = result.errors.get(i)
        yield PhotographFeatures(file, result.embeddings[i if error is None else slice(0)], error)


def read_photographs(file: Path) -> Embeddings:
    """Read a table of photographs that `row_files.write_records` wrote.

    Raises:
        UserError: it has no rows.
    """
    if file.suffix == ".jsonl":
        records = [parse_json(line) for line in file.read_text("utf-8").split("\n")[:-1]]
        pairs = [(r["file"], r["features"]) for r in records if "features" in r]
    elif file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as lines:
            pairs = [(row[0], [float(x) for x in row[1:]]) for row in list(csv.reader(lines))[1:]]
    else:
        import pyarrow.parquet

        columns = pyarrow.parquet.read_table(file).to_pydict()
        first, *others = columns.values()
        pairs = [(name, list(row)) for name, *row in zip(first, *others, strict=True)]
    if not pairs:
        raise UserError(f"{file} has no rows: no image could be read.")
    names, rows = zip(*pairs, strict=True)
    return Embeddings({"file": list(names)}, np.array(rows, np.float32))


def cut_tiles(
    pixels: UInt8[np.ndarray, "h w c"], size: tuple[int, int]
) -> Iterator[UInt8[np.ndarray, "h2 w2 c"]]:
    """Cut as many tiles of `size` as fit side by side, around the centre; a smaller field is padded to one tile."""
    missing = [max(0, wanted - have) for wanted, have in zip(size, pixels.shape[:2], strict=True)]
    if any(missing):
        pixels = np.pad(pixels, [*((m // 2, m - m // 2) for m in missing), (0, 0)])
    counts = [have // wanted for have, wanted in zip(pixels.shape[:2], size, strict=True)]
    starts = [
        (have - count * wanted) // 2
        for have, count, wanted in zip(pixels.shape[:2], counts, size, strict=True)
    ]
    for row in range(counts[0]):
        for column in range(counts[1]):
            top, left = starts[0] + row * size[0], starts[1] + column * size[1]
            yield pixels[top : top + size[0], left : left + size[1]]


def draw_embeddings(table: Embeddings, colour: str | None, picture: Path | str) -> None:
    """Draw the first two principal components, coloured by a column, or in one colour.

    Raises:
        UserError: there is no such column.
    """
    import matplotlib.pyplot as plt

    if colour is not None and colour not in table.metadata:
        raise UserError(
            f"there is no column {colour!r}: choose one of {', '.join(table.metadata)}."
            + suggest(colour, table.metadata)
        )
    centred = table.features - table.features.mean(axis=0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    points = (left * scale)[:, :2]
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    share = np.zeros(2)
    share[: len(scale)] = scale[:2] ** 2 / max((scale**2).sum(), 1e-30)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    values = [""] * len(points) if colour is None else table.metadata[colour]
    different = list(dict.fromkeys(values))
    if len(different) <= _MOST_NAMED:
        for value in different:
            rows = np.array([v == value for v in values])
            axes.plot(*points[rows].T, "o", ms=4, alpha=0.7, label=value)
        if colour is not None:
            axes.legend(fontsize=8)
    else:  # A legend of all wells of a plate would cover the points.
        different.sort()
        place = {value: i for i, value in enumerate(different)}
        x, y = points.T
        shown = axes.scatter(x, y, c=[place[v] for v in values], cmap="turbo", s=16, alpha=0.7)
        ticks = np.linspace(0, len(different) - 1, 9).round().astype(int)
        bar = figure.colorbar(shown, ticks=ticks, label=colour)
        bar.ax.set_yticklabels([different[i] for i in ticks], fontsize=8)
    labels = [f"component {i + 1} ({100 * s:.0f} % of the variance)" for i, s in enumerate(share)]
    axes.set(
        xlabel=labels[0], ylabel=labels[1], title=f"{counted(len(points), 'row')}{_by(colour)}"
    )
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _by(colour: str | None) -> str:
    return "" if colour is None else f" by {colour}"


def _make_features(model: Any, data: CellsData) -> Any:
    """Compile features of tiles `b h w k` and their channels `b k`; once for each number of channels."""
    graphdef, params = nnx.split(model)
    preprocess = make_preprocess(data)

    @jax.jit
    def features(params: Any, tiles: jax.Array, ids: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graphdef, params)
        batch = {"channel_ids": ids}
        return model.features(**channel_inputs(model, preprocess(tiles, ids), batch))

    return lambda tiles, ids: features(params, tiles, ids)


def _in_batches(
    features_of: Any, tiles: Sequence[np.ndarray], ids: tuple[int, ...], batch_size: int
) -> Float[np.ndarray, "n d"]:
    """Embed tiles in batches of one size, the last filled up, so that one program serves all fields."""
    found = []
    channel_ids = np.tile(np.asarray(ids, np.int32), (batch_size, 1))
    for start in range(0, len(tiles), batch_size):
        chunk = np.stack(tiles[start : start + batch_size])
        padded = np.pad(chunk, ((0, batch_size - len(chunk)), (0, 0), (0, 0), (0, 0)))
        found.append(np.asarray(features_of(padded, channel_ids), np.float32)[: len(chunk)])
    return np.concatenate(found)

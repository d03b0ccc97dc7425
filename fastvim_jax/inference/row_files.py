"""Write one record per image as it is made, to JSON lines, CSV or Parquet, so that the file can be continued.

A Parquet file cannot be appended to. Until all records are made, its rows lie in a CSV file beside it,
`<name>.partial.csv`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json
from fastvim_jax.lock import locked_beside

KINDS = (".jsonl", ".csv", ".parquet")


@runtime_checkable
class Record(Protocol):
    """The result of a command for one image file."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; `file` is the image's name, made printable (`data.records.printable`)."""
        ...

    def to_rows(self) -> Sequence[Sequence[Any]]:
        """Return the rows of a table, each as long as its columns; the first value is the name that `to_dict` gives."""
        ...


AnyRecord = TypeVar("AnyRecord", bound=Record)


@contextlib.contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Keep other processes from writing records to `out`. Hold this from `already_written` until all are written.

    Raises:
        UserError: another process holds it, the folder cannot be made, or `out` is no regular file.
    """
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is no regular file: name another.")
    _make_folder(out)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked_beside(out, "file"))
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
        yield


def already_written(out: Path) -> dict[str, bool]:
    """Say of each image file whose record `out` holds already whether that record is an error.

    A command that is given again skips these files.

    Raises:
        UserError: `out` has an unknown ending, is a complete Parquet file, or holds something else.
    """
    if out.suffix not in KINDS:
        raise UserError(f"{out}: results are written to a file that ends in {', '.join(KINDS)}.")
    if out.suffix == ".parquet" and out.exists():
        _finish(out)
        raise UserError(
            f"{out} is complete, and Parquet files cannot be added to: name another, or use .jsonl or .csv."
        )
    out = _growing(out)
    if not out.exists():
        return {}
    try:
        text = _without_torn_record(out)
        if out.suffix == ".jsonl":
            found = map(parse_json, text.split("\n")[:-1])
            return {each["file"]: each.get("error") is not None for each in found}
        return {image.name: image.is_error for image in _images_of(text)[1]}
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error, OSError) as error:
        raise UserError(f"{out} holds no results that could be continued: {error}") from error


def claim(out: Path, made_by: Mapping[str, Any]) -> None:
    """Write what makes the records of `out` to `<out>.made_by.json`, or compare with the note that is there.

    Otherwise one model would continue the file of another model, or take its images as done.

    Args:
        out: the file, as `already_written` takes it.
        made_by: JSON-able values by name, for example a digest of the model.

    Raises:
        UserError: something else made the records that `out` holds, the note is missing, or the folder cannot be made.
    """
    note = _note(out)
    out = _growing(out)
    if not out.exists() or not out.stat().st_size:
        _make_folder(out)
        note.write_text(json.dumps(made_by, indent=2) + "\n", "utf-8")
        return
    try:
        before = dict(parse_json(note.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{out} exists, and {note.name}, which says what made its records, cannot be read: name another file, or "
            "delete this one."
        ) from None
    changed = [name for name in {**before, **made_by} if before.get(name) != made_by.get(name)]
    if changed:
        raise UserError(
            f"{out} holds records that were made with another {' and '.join(changed)}: name another file, or delete "
            "this one."
        )


def read_records(out: Path) -> list[dict[str, Any]]:
    """Read the records of a file of JSON lines that may have been cut off; [] if there is no file.

    Raises:
        UserError: it holds something else.
    """
    if not out.exists():
        return []
    try:
        return [dict(parse_json(line)) for line in _without_torn_record(out).split("\n")[:-1]]
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{out} holds no results that could be continued: {error}") from error


def forget(out: Path) -> None:
    """Delete a file of records and the note that `claim` wrote."""
    for file in (out, _note(out)):
        file.unlink(missing_ok=True)


def write_records(
    records: Iterable[AnyRecord], out: Path, columns: Mapping[str, str]
) -> Iterator[AnyRecord]:
    """Write each record to `out` and yield it.

    A record is written before the next one is made. A Parquet file is made of all records after the last one.

    Args:
        records: in the order to write.
        out: the file; one that `already_written` takes.
        columns: name and Arrow type of each column of a table; the first one is the image file's name.

    Raises:
        UserError: the CSV file has other columns; the folder cannot be made; pyarrow is missing.
    """
    _make_folder(out)
    write = {".jsonl": _write_lines, ".csv": _write_csv, ".parquet": _write_parquet}[out.suffix]
    return write(records, out, columns)


def _growing(out: Path) -> Path:
    """Return the file that records are appended to."""
    return out.with_name(f"{out.name}.partial.csv") if out.suffix == ".parquet" else out


def _finish(out: Path) -> None:
    """Delete the rows that a complete Parquet file was made of, if the process was killed before it did so."""
    rows = _growing(out)
    if not rows.exists():
        return
    import pyarrow.parquet

    with contextlib.suppress(OSError, ValueError, csv.Error, pyarrow.ArrowException):
        with rows.open(newline="", encoding="utf-8") as file:
            count = sum(1 for _ in csv.reader(file)) - 1
        # Rows of another file of this name are kept: an interrupted call made them.
        if count == pyarrow.parquet.read_metadata(out).num_rows:
            rows.unlink()
            _note(out).unlink(missing_ok=True)


def _note(out: Path) -> Path:
    return out.with_name(f"{out.name}.made_by.json")


def _make_folder(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error


def _write_lines(
    records: Iterable[AnyRecord], out: Path, columns: Mapping[str, str]
) -> Iterator[AnyRecord]:
    with out.open("a", encoding="utf-8") as file:
        _cut_torn_record(out)
        for each in records:
            file.write(json.dumps(each.to_dict(), ensure_ascii=False) + "\n")
            file.flush()
            yield each


def _write_csv(
    records: Iterable[AnyRecord], out: Path, columns: Mapping[str, str]
) -> Iterator[AnyRecord]:
    with out.open("a+", newline="", encoding="utf-8") as file:
        _cut_torn_record(out)
        file.seek(0)
        there = next(csv.reader(file), None)
        if there is not None and there != list(columns):
            raise UserError(
                f"{out} has {len(there)} columns, {', '.join(there[:4])}, ..., but this command writes {len(columns)}: "
                "it was made with another model or option. Name another file."
            )
        writer = csv.writer(file)
        if there is None:
            writer.writerow(columns)
        for each in records:
            writer.writerows(each.to_rows())
            file.flush()
            yield each


def _write_parquet(
    records: Iterable[AnyRecord], out: Path, columns: Mapping[str, str]
) -> Iterator[AnyRecord]:
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{out} needs pyarrow: pip install 'fastvim-jax[data]', or write .jsonl or .csv."
        ) from None
    rows = _growing(out)
    yield from _write_csv(records, rows, columns)
    types = {name: getattr(pyarrow, kind)() for name, kind in columns.items()}
    # Only an empty cell is null, because classes and files may be called NA or null.
    options = pyarrow.csv.ConvertOptions(
        column_types=types, null_values=[""], strings_can_be_null=True
    )
    lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
    partial = out.with_name(out.name + ".partial")
    with (
        pyarrow.csv.open_csv(rows, parse_options=lines, convert_options=options) as batches,
        pyarrow.parquet.ParquetWriter(partial, pyarrow.schema(list(types.items()))) as file,
    ):
        for batch in batches:
            file.write_batch(batch)
    os.replace(partial, out)
    for file_of_rows in (rows, _note(out)):
        file_of_rows.unlink(missing_ok=True)


class _Image(NamedTuple):
    """The rows of an image in a CSV text: how many there are, and where they end."""

    name: str
    is_error: bool
    rows: int
    end: int


def _without_torn_record(out: Path) -> str:
    """Read the records; a last one that a crash cut off is left out, with all of its rows."""
    data = out.read_bytes()
    text = data[: data.rfind(b"\n") + 1].decode("utf-8")
    if out.suffix == ".jsonl":
        return text
    # With an odd number of quotes, the line break at which the file ends lies within a text.
    torn = len(text.encode()) < len(data) or text.count('"') % 2 == 1
    end, images = _images_of(text)
    if not images or not (torn or _lacks_rows(images)):
        return text
    return text[: images[-2].end if len(images) > 1 else end]


def _lacks_rows(images: Sequence[_Image]) -> bool:
    """Return whether a crash may have cut off rows of the last image: several rows are not written at once."""
    whole = [image.rows for image in images[:-1] if not image.is_error] or [1]
    return not images[-1].is_error and images[-1].rows != whole[-1]


def _images_of(text: str) -> tuple[int, list[_Image]]:
    """Return where the header of a CSV text ends, and the images of its rows."""
    rows = _rows_of(text)
    header, start = next(rows, ([], 0))
    place = header.index("error") if "error" in header else len(header)
    images = []
    told = ((row[0], any(row[place : place + 1]), end) for row, end in rows)
    for (name, is_error), group in itertools.groupby(told, key=lambda each: each[:2]):
        ends = [end for _, _, end in group]
        images.append(_Image(name, is_error, len(ends), ends[-1]))
    return start, images


def _rows_of(text: str) -> Iterator[tuple[list[str], int]]:
    """Yield the rows of a CSV text, and where each one ends."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in io.StringIO(text, newline=""):
            end += len(line)
            yield line

    for row in csv.reader(lines()):
        yield row, end


def _cut_torn_record(out: Path) -> None:
    if out.stat().st_size:
        os.truncate(out, len(_without_torn_record(out).encode("utf-8")))

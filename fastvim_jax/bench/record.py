"""Print a benchmark's rows as a table, and write them to a JSON file with device, versions, commit and command."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastvim_jax.errors import UserError
from pallas_kernels import timing

Row = dict[str, Any]
Columns = Sequence[tuple[str, int, Callable[[Row], str]]]


def show(
    bench: str, rows: Iterable[Row], columns: Columns, *, command: str, file: Path | None = None
) -> list[Row]:
    """Print a line about the device, then every row as it comes. If `file` is given, write the rows there, too.

    The file is rewritten after every row, so that an interrupted run keeps its rows. It holds `bench`, `circumstances`
    (device, versions, commit, date, command), `complete` (whether the run came to its end) and `rows`. Times are in
    milliseconds, sizes in bytes.

    Returns:
        The rows.

    Raises:
        UserError: the file cannot be written. This is checked before anything is measured.
    """
    circumstances = timing.circumstances(command)
    seen: list[Row] = []

    def keep(complete: bool) -> None:
        if file is not None:
            record = {
                "bench": bench,
                "circumstances": circumstances,
                "complete": complete,
                "rows": seen,
            }
            _write(file, json.dumps(record, indent=1) + "\n")

    if file is not None:
        _check(file)
    print(f"device: {circumstances['device']}, JAX {circumstances['jax']}", flush=True)
    print("  ".join(name.ljust(width) for name, width, _ in columns).rstrip(), flush=True)
    for row in rows:
        seen.append(row)
        print(_line(row, columns), flush=True)
        keep(False)
    keep(True)
    return seen


@contextlib.contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the file and the option."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}. Give --json another file."
        ) from error


def _part(file: Path) -> Path:
    return file.with_name(file.name + ".part")


def _check(file: Path) -> None:
    """Check that the file can be written, without touching what it holds."""
    with _named_errors(file):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():  # a device or a pipe
            return
        _part(file.resolve()).touch()
        _part(file.resolve()).unlink()


def _write(file: Path, text: str) -> None:
    """Write all of the text or nothing. Links are followed. A device or a pipe is written in place."""
    with _named_errors(file):
        if file.exists() and not file.is_file():
            file.write_text(text)
            return
        file = file.resolve()
        _part(file).write_text(text)
        os.replace(_part(file), file)


def _line(row: Row, columns: Columns) -> str:
    for reason in ("skipped", "failed"):
        if reason in row:
            rest = [(k, v) for k, v in row.items() if k != reason]
            named = ", ".join(v if isinstance(v, str) else f"{k} {v}" for k, v in rest)
            return f"{reason}: {named}: {row[reason]}"
    text = "  ".join(text(row).ljust(width) for _, width, text in columns).rstrip()
    return text if row.get("correct", True) else text + "  WRONG RESULT"


def sound(rows: Iterable[Row]) -> bool:
    """Return whether nothing failed and all results that were checked were right."""
    return all("failed" not in row and row.get("correct", True) for row in rows)

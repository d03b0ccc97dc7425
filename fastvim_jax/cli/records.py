"""Write the results of a command for many image files, and continue where an interrupted command stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvim_jax.errors import counted


def write_results(
    files: Sequence[str],
    make: Callable[[Sequence[str]], Iterable[Any]],
    out: Path,
    columns: Mapping[str, str],
    verb: str,
    made_by: Mapping[str, Any],
) -> int:
    """Write a record for each file that `out` does not hold yet, and show a progress bar.

    Args:
        files: image files.
        make: makes the records of the remaining files, in order; `error` is set if a file could not be read.
        out, columns: see `inference.row_files.write_records`.
        verb: label of the progress bar.
        made_by: see `inference.row_files.claim`.

    Returns:
        The exit status: 1 if a file could not be read, now or when its record was made.
    """
    from rich.console import Console
    from rich.progress import track

    from fastvim_jax.data.records import printable
    from fastvim_jax.inference.row_files import already_written, claim, reserved, write_records

    with reserved(out):
        done = already_written(out)
        claim(out, made_by)
        left = [file for file in files if printable(file) not in done]
        console = Console(stderr=True)
        records = write_records(make(left), out, columns)
        failed = sum(done.get(printable(file), False) for file in files)
        for each in track(
            records, verb, len(left), console=console, disable=not console.is_terminal
        ):
            failed += complain(each)
        before = f" ({len(files) - len(left)} were there)" if len(left) < len(files) else ""
        unread = f", {failed} of which could not be read" if failed else ""
        print(f"{out}: {counted(len(files), 'file')}{before}{unread}.")
        return int(failed > 0)


def complain(record: Any) -> bool:
    """Print why a file has no result, if it has none."""
    if record.error is not None:
        print(f"fastvim: {record.error}", file=sys.stderr)
    return record.error is not None

"""Write predictions as they come, to JSON lines or CSV that an interrupted command goes on with, or to Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastvim_jax.errors import UserError
from fastvim_jax.inference.predict import Prediction

KINDS = (".jsonl", ".csv", ".parquet")
_COLUMNS = ("file", "rank", "class", "label", "probability", "error")


def already_written(out: Path) -> set[str]:
    """Return the files whose predictions `out` holds; the command that was interrupted leaves them out.

    Raises:
        UserError: a name of another kind, a Parquet file that exists, or a file of something else.
    """
    if out.suffix not in KINDS:
        raise UserError(
            f"{out}: predictions are written to a file that ends in {', '.join(KINDS)}."
        )
    if not out.exists():
        return set()
    if out.suffix == ".parquet":
        raise UserError(
            f"{out} exists, and Parquet files cannot be continued: name another, or use .jsonl."
        )
    try:
        if out.suffix == ".jsonl":
            return {record["file"] for record in _whole_lines(out)}
        with out.open(newline="", encoding="utf-8") as file:
            return {row["file"] for row in csv.DictReader(file)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} holds no predictions to go on with: {error}") from error


def write_predictions(predictions: Iterable[Prediction], out: Path) -> Iterator[Prediction]:
    """Write each prediction to `out` and hand it on.

    A JSON line or a CSV row is on disk before the next prediction is made. Parquet is written when all are made.
    """
    if out.suffix == ".jsonl":
        _cut_torn_line(out)
        with out.open("a", encoding="utf-8") as file:
            for each in predictions:
                file.write(json.dumps(each.to_dict(), ensure_ascii=False) + "\n")
                file.flush()
                yield each
    elif out.suffix == ".csv":
        new = not out.exists()
        with out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(_COLUMNS)
            for each in predictions:
                writer.writerows(_rows(each))
                file.flush()
                yield each
    else:
        rows = []
        for each in predictions:
            rows += _rows(each)
            yield each
        _write_parquet(rows, out)


def _rows(each: Prediction) -> list[tuple]:
    if each.error is not None:
        return [(each.file, None, None, None, None, each.error)]
    ranked = zip(each.class_names, each.labels, each.probabilities, strict=True)
    return [
        (each.file, rank, name, label, probability, None)
        for rank, (name, label, probability) in enumerate(ranked, start=1)
    ]


def _write_parquet(rows: list[tuple], out: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{out} needs pyarrow: pip install 'fastvim-jax[data]', or write .jsonl or .csv."
        ) from None
    columns = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True)) if rows else {}
    table = pyarrow.table({name: list(columns.get(name, ())) for name in _COLUMNS})
    pyarrow.parquet.write_table(table, out)


def _whole_lines(out: Path) -> list[dict]:
    """Read the records; a last line that was cut off by a crash is left out."""
    lines = out.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _cut_torn_line(out: Path) -> None:
    if out.exists() and (data := out.read_bytes()) and not data.endswith(b"\n"):
        out.write_bytes(data[: data.rfind(b"\n") + 1])

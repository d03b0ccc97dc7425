"""Class lists beside a data set: what label and which folder each class has."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from fastvim_jax.errors import UserError


class ClassList(NamedTuple):
    """Classes in label order."""

    names: tuple[str, ...]
    """What to show to a reader."""
    folders: tuple[str, ...]
    """What the class's folder is called (the WordNet id in ImageNet's case); the name if nothing else is said."""


def read_class_list(file: Path) -> ClassList:
    """Read `classes.txt` (one name a line) or a TSV with the columns label, wnid or folder, and name.

    Raises:
        UserError: when the file is missing, empty, or its labels are not 0, 1, 2, ...
    """
    if not file.is_file():
        raise UserError(f"The class list {str(file)!r} does not exist.")
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".tsv":
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not names:
            raise UserError(f"The class list {str(file)!r} is empty.")
        return ClassList(names, names)
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    if not rows or "label" not in rows[0] or "name" not in rows[0]:
        raise UserError(
            f"The class list {str(file)!r} needs a header with the columns label and name."
        )
    rows.sort(key=lambda row: int(row["label"]))
    if [int(row["label"]) for row in rows] != list(range(len(rows))):
        raise UserError(f"The labels in {str(file)!r} are not 0, 1, 2, ... without gaps.")
    folder = next((key for key in ("wnid", "folder") if key in rows[0]), "name")
    return ClassList(tuple(row["name"] for row in rows), tuple(row[folder] for row in rows))


def find_class_list(root: Path) -> ClassList | None:
    """Return the class list that lies in the data set's folder, if there is one."""
    for name in ("classes.tsv", "classes.txt"):
        if (root / name).is_file():
            return read_class_list(root / name)
    return None

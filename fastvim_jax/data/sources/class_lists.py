"""Read class lists: the label, the name and the folder of each class of a data set."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import NamedTuple

from fastvim_jax.errors import UserError

_log = logging.getLogger(__name__)

FILES = ("classes.tsv", "classes.csv", "classes.txt")
"""Names under which a class list is found in a data set's folder, the first that exists."""
_MOST_BYTES = 2**26
_DELIMITERS = {".tsv": "\t", ".csv": ",;\t"}


class ClassList(NamedTuple):
    """Classes in label order."""

    names: tuple[str, ...]
    """Names of the classes, for people."""
    folders: tuple[str, ...]
    """Names of the classes' folders (in ImageNet the WordNet ids); by default the names of the classes."""
    file: str = ""
    """File that the list was read from."""


def read_class_list(file: Path) -> ClassList:
    """Read a text file (one name per line), or a table (.tsv, .csv) with the columns label, wnid or folder, and name.

    Byte order marks, Windows line ends, UTF-16 and, with a warning, Windows-1252 are understood.

    Raises:
        UserError: when the file is missing, empty, or its labels are not 0, 1, 2, ...
    """
    if not file.is_file():
        raise UserError(f"The class list {str(file)!r} does not exist.")
    lines = read_list_text(file).splitlines()
    if file.suffix.lower() not in _DELIMITERS:
        names = tuple(line.strip() for line in lines if line.strip())
        if not names:
            raise UserError(f"The class list {str(file)!r} is empty.")
        return ClassList(names, names, str(file))
    return _read_table(file, lines)


def folder_labels(classes: ClassList) -> dict[str, int]:
    """Map each class's folder to its label.

    Raises:
        UserError: when two classes share a folder.
    """
    labels: dict[str, int] = {}
    for label, folder in enumerate(classes.folders):
        if folder in labels:
            raise UserError(
                f"{classes.file!r} gives the folder {folder!r} two labels, {labels[folder]} and {label}: "
                "remove one, or name the folders in a column `folder` of a classes.tsv."
            )
        labels[folder] = label
    return labels


def find_class_list(root: Path) -> ClassList | None:
    """Return the class list that lies in the data set's folder, if there is one."""
    return next((read_class_list(root / name) for name in FILES if (root / name).is_file()), None)


def read_list_text(file: Path) -> str:
    """Read a class list's text; see `read_class_list` for what is understood.

    Raises:
        UserError: the file cannot be read, is too large or is no text.
    """
    try:
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise UserError(f"{str(file)!r} has {size:,} bytes: too many for a class list.")
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"The class list {str(file)!r}: {error.strerror or error}.") from None
    try:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content:
            raise UserError(f"The class list {str(file)!r} is no text: save it as UTF-8.") from None
        _log.warning(
            "The class list %r is not UTF-8 (byte %d); it is read as Windows-1252.",
            str(file),
            error.start,
        )
        return content.decode("cp1252", "replace")


def _read_table(file: Path, lines: list[str]) -> ClassList:
    where = f"The class list {str(file)!r}"
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{where} is empty.")
    delimiter = max(_DELIMITERS[file.suffix.lower()], key=lines[0].count)
    try:
        head, *rows = csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:
        raise UserError(f"{where} cannot be read as a table: {error}.") from None
    columns = {cell.strip().lower(): place for place, cell in reversed([*enumerate(head)])}
    if not {"label", "name"} <= set(columns):
        raise UserError(
            f"{where} needs a header with the columns label and name; it has {', '.join(head)}."
        )
    folder = next((key for key in ("wnid", "folder") if key in columns), "name")
    found: dict[int, tuple[str, str]] = {}
    for row in rows:
        try:
            text, name, place = (row[columns[key]].strip() for key in ("label", "name", folder))
        except IndexError:
            raise UserError(f"{where}: the row {delimiter.join(row)!r} lacks a column.") from None
        # int() would take "1_0" and refuses, by an error of its own, more than 4,300 digits.
        label = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
        if label < 0:
            raise UserError(
                f"{where}: the label {text[:20]!r} of {name!r} is no whole number from 0 to 999999999."
            )
        if label in found:
            raise UserError(
                f"{where} gives the label {label} twice, to {found[label][0]!r} and {name!r}."
            )
        if not name or not place:
            raise UserError(f"{where}: the class {label} has no name or no folder.")
        found[label] = name, place
    missing = next((label for label in range(len(found)) if label not in found), None)
    if missing is not None or not found:
        raise UserError(
            f"The labels in {str(file)!r} are not 0, 1, 2, ... without gaps: {missing or 0} is missing."
        )
    pairs = [found[label] for label in range(len(found))]
    return ClassList(tuple(n for n, _ in pairs), tuple(p for _, p in pairs), str(file))

"""Size and digest of every file of a checkpoint, so that it can be checked before it is trusted."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def write_checksums(folder: Path, record: Path, *, leave_out: frozenset[str] = frozenset()) -> None:
    """List the files below `folder` in the JSON file `record`, which appears in one step.

    Args:
        folder: a checkpoint whose files are final, whatever the folder is called at the moment.
        record: the list to write; its folder is made.
        leave_out: names of files directly in `folder` that are still to change.

    Raises:
        OSError: when the list cannot be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    listing = {name: _fingerprint(path) for path, name in names.items() if name not in leave_out}
    record.parent.mkdir(exist_ok=True)
    temporary = record.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(listing, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, record)


def find_damage(folder: Path, record: Path) -> str | None:
    """What is wrong with the files of a checkpoint, by its record; None if nothing is, or if there is no record."""
    if not record.is_file():
        return None
    for name, (size, digest) in json.loads(record.read_text(encoding="utf-8")).items():
        path = folder / name
        if not path.is_file():
            return f"the file {name} is missing"
        found_size, found_digest = _fingerprint(path)
        if found_size != size:
            return f"the file {name} has {found_size} of {size} bytes"
        if found_digest != digest:
            return f"the file {name} has changed since it was written"
    return None


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()

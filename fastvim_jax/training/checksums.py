"""Record size and digest of every file of a checkpoint, so that it can be checked before it is trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from pathlib import Path

from fastvim_jax.json_text import parse_json
from fastvim_jax.regular_file import read_regular_file
from fastvim_jax.training.disk import replace_file


def write_checksums(folder: Path, record: Path, *, leave_out: frozenset[str] = frozenset()) -> None:
    """List the files below `folder` in the JSON file `record`, which is written atomically.

    Args:
        folder: a checkpoint whose files are final. The folder itself may still be renamed.
        record: the list to write; its folder is made.
        leave_out: names of files directly in `folder` that will still change.

    Raises:
        OSError: the list cannot be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    listing = {name: _fingerprint(path) for path, name in names.items() if name not in leave_out}
    record.parent.mkdir(exist_ok=True)
    replace_file(record, json.dumps(listing, indent=1))


def find_damage(folder: Path, record: Path, items: Container[str] | None = None) -> str | None:
    """Compare the files of a checkpoint with its record.

    Args:
        folder: the checkpoint.
        record: the list that `write_checksums` made.
        items: folders directly in `folder` whose files are compared; None: all files.

    Returns:
        A description of the first damage, or None if there is none.

    Raises:
        FileNotFoundError: there is no record.
    """
    try:
        listing = parse_json(read_regular_file(record))
        expected = {name: (int(size), str(digest)) for name, (size, digest) in listing.items()}
    except FileNotFoundError:
        raise
    except (AttributeError, TypeError, ValueError, OverflowError, OSError):
        return f"its record of checksums {record} cannot be read"
    if not expected:
        return f"its record of checksums {record} is empty"
    for name, fingerprint in expected.items():
        path = folder / name
        if items is not None and name.split("/")[0] not in items:
            continue
        if not path.is_file():
            return f"the file {name} is missing"
        found = path.stat().st_size
        if found != fingerprint[0]:
            return f"the file {name} has {found} of {fingerprint[0]} bytes"
        if _fingerprint(path) != fingerprint:
            return f"the file {name} has changed since it was written"
    return None


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()

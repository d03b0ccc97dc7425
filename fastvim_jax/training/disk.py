"""Write small files so that no crash can damage them, and explain to the user why a file could not be written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastvim_jax.errors import UserError

GO_ON = (
    "Fix that, then give the same command again: the run continues from its last good checkpoint."
)
"""What to do about a file that could not be written."""

# TensorStore and Orbax wrap the system's error in other exceptions, so recognise it by its text.
_CAUSES = (
    (r"No space left on device|ENOSPC", "the disk is full"),
    (r"Disk quota exceeded|EDQUOT", "the disk quota is used up"),
    (r"File too large|EFBIG", "a file would exceed the size that the system allows (ulimit -f)"),
    (r"Read-only file system|EROFS", "the file system is read-only"),
    (r"Permission denied|EACCES", "writing there is not permitted"),
)


def why_not_written(error: BaseException, path: Path) -> str:
    """Explain why `path` could not be written: the cause and the free space, or the error's text."""
    texts = []
    link: BaseException | None = error
    while link is not None:
        texts.append(f"{type(link).__name__}: {link}")
        link = link.__cause__ or link.__context__
    for pattern, cause in _CAUSES:
        if re.search(pattern, "\n".join(texts)):
            return f"{cause} ({_room(path)})"
    return texts[0].strip().splitlines()[0]


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised inside into a `UserError` about the file.

    Raises:
        UserError: the file could not be written. The message says why, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {why_not_written(error, path)}. {GO_ON}"
        ) from error


def replace_file(path: Path, text: str) -> None:
    """Replace a file in one step, so that a crash or a power cut leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def keep_damaged(path: Path) -> Path:
    """Rename an unreadable file to `<name>.damaged`, so that a new one can be written. Return the new path."""
    kept = path.with_name(path.name + ".damaged")
    os.replace(path, kept)
    return kept


def _room(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return f"at {path}"
    return f"{free / 1e6:,.0f} MB free at {path}"

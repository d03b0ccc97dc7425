"""Read the files of a data set: regular files only, and only inside its folder unless links may lead out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fastvim_jax.data.records import DecodeError, printable
from fastvim_jax.errors import UserError

MAX_BYTES = 2**30
"""Size of the largest image file that is read, 1 GiB."""


def read_file(file: Path | str) -> bytes:
    """Read a regular file.

    Raises:
        DecodeError: when it is a FIFO, a device or a folder, is too large, or cannot be read.
    """
    name = printable(str(file))
    try:
        opened = open(file, "rb", opener=_open_without_waiting)
    except OSError as error:
        raise DecodeError(f"{name}: {error.strerror or error}.") from None
    except ValueError as error:  # A null character in the name.
        raise DecodeError(f"{name}: {error}.") from None
    with opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DecodeError(f"{name}: not a regular file.")
        if status.st_size > MAX_BYTES:
            raise DecodeError(f"{name}: {status.st_size:,} bytes are too many for an image.")
        try:
            return opened.read()
        except OSError as error:
            raise DecodeError(f"{name}: {error.strerror or error}.") from None


def require_regular(file: Path | str) -> None:
    """Refuse what is no regular file, before a library opens it: opening a FIFO waits for a writer.

    Raises:
        DecodeError: it is a FIFO, a device or a folder, or is not there.
    """
    name = printable(str(file))
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except OSError as error:
        raise DecodeError(f"{name}: {error.strerror or error}.") from None
    if not regular:
        raise DecodeError(f"{name}: not a regular file.")


def _open_without_waiting(file: str, flags: int) -> int:
    """Open a file without blocking, because opening a FIFO otherwise waits for a writer."""
    return os.open(file, flags | os.O_NONBLOCK)


def read_inside(root: Path, path: str, *, follow_links: bool) -> bytes:
    """Read a regular file that a record names by its path in the data set's folder.

    Raises:
        DecodeError: when the path leads out of the folder, or `read_file` refuses the file.
    """
    name = printable(path)
    try:
        file = root / path
        outside = not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(root))
        if not follow_links:
            outside = outside or not file.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise DecodeError(f"{name}: {error}.") from None
    if outside:
        raise DecodeError(f"{name}: the path leads out of the data set's folder; it is not read.")
    return read_file(file)


def walk(folder: Path, root: Path, *, follow_links: bool) -> Iterator[str]:
    """List the files under a folder in an order that does not depend on the file system.

    Hidden files and folders are left out. Links to what lies in `root` are followed; a folder that contains itself by
    a link is listed once.

    Args:
        folder: where to look.
        root: the data set's folder.
        follow_links: follow links out of `root`, too.

    Raises:
        UserError: for a link out of `root` unless `follow_links`.
    """
    home = os.path.realpath(root)
    yield from _walk(str(folder), home, follow_links, frozenset())


def _walk(folder: str, home: str, follow_links: bool, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    folders = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            check_link(entry.path, home, follow_links=follow_links)
        if is_folder(entry):
            folders.append(entry.path)
        else:
            yield entry.path
    for each in folders:
        yield from _walk(each, home, follow_links, above | {real})


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder, or a link to one. A link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def check_link(link: str, home: str, *, follow_links: bool) -> None:
    """Refuse a link out of the data set's folder `home` (a real path).

    Raises:
        UserError: naming the link and the option that follows it.
    """
    target = os.path.realpath(link)
    name = printable(link)
    if not (follow_links or Path(target).is_relative_to(home)):
        raise UserError(
            f"{name} is a link out of the data set's folder, to {printable(target)}. If that is meant, set "
            "data.follow_links=True (--data.follow-links; for `fastvim data`: --follow-links)."
        )

"""Read small files that may come from strangers."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular_file(file: Path | str) -> bytes:
    """Read a regular file. Opening a FIFO would wait for a writer, and a device may never end.

    Raises:
        OSError: the file cannot be read, or is a FIFO, a device or a folder.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(file))
        return opened.read()

"""Write to standard output and error even if nobody can read them, because this must not end a run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def survive_closed_output(stream: Any) -> Iterator[None]:
    """Ignore an error while writing to `stream`, and send everything after it to the null device."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: I/O operation on closed file.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str, stream: Any) -> None:
    """Print a line to `stream` at once; drop it if nobody can read it."""
    with survive_closed_output(stream):
        print(text, file=stream, flush=True)


def open_standard_streams() -> None:
    """Open the null device in the place of standard streams that this process was started without.

    Otherwise the next files that are opened get their descriptors, and messages of libraries are written into them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))

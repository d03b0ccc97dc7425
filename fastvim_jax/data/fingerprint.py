"""Detect that a source's records have changed, without decoding them and, where possible, without reading them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from fastvim_jax.data.records import DecodeError, Source


@runtime_checkable
class Stamped(Protocol):
    """A source that can tell cheaply whether a record has changed."""

    def stamp(self, index: int) -> str:
        """Return a string that changes whenever the record's image, label or name does."""
        ...


def fingerprint(source: Source, start: int, stop: int) -> str:
    """Return a digest of the records `start` to `stop`, as hexadecimal digits. Equal records have equal digests.

    For a `Stamped` source the digest is that of its stamps (sizes and times of change of files); for any other source
    the records are read. An unreadable file enters the digest as unreadable, so that it changes when the file returns.
    """
    digest = hashlib.blake2b(digest_size=16)
    for index in range(start, stop):
        try:
            stamp = source.stamp(index) if isinstance(source, Stamped) else _content(source, index)
        except (OSError, DecodeError) as error:
            stamp = f"unreadable: {type(error).__name__}"
        digest.update(f"{len(stamp)}:{stamp}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def file_stamp(file: Path | str) -> str:
    """Return a string of a file's size and time of change.

    Raises:
        OSError: the file does not exist.
    """
    status = os.stat(file)
    return f"{status.st_size} {status.st_mtime_ns}"


def _content(source: Source, index: int) -> str:
    record = source[index]
    if isinstance(record.image, np.ndarray):
        content, shape = np.ascontiguousarray(record.image).tobytes(), str(record.image.shape)
    else:
        content, shape = record.image, ""
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return f"{digest} {shape} {record.target} {record.name}"

"""Read an image that a user names: a file, or a member of a tar file such as `photos.tar/2024/cat.jpg`."""

from __future__ import annotations

import functools
import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fastvim_jax.data.files import MAX_BYTES, read_file
from fastvim_jax.data.records import DecodeError, printable
from fastvim_jax.errors import UserError

_log = logging.getLogger(__name__)


def regular_members(tar: tarfile.TarFile, shard: str) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an opened tar file, and check that nothing but zeros follows the last.

    `tarfile` ends without an error at the first header that is damaged or cut short. All later members would then be
    missing without a word.

    Raises:
        UserError: something that is no member follows.
        tarfile.TarError: the first header is damaged, or the last member is cut short.
    """
    for member in tar:
        # Links and devices are no files; a sparse file's bytes do not lie in one piece.
        if member.isfile() and not member.issparse():
            yield member
    file, place = tar.fileobj, tar.offset
    assert file is not None
    file.seek(place)
    rest = iter(functools.partial(file.read, 2**20), b"")
    first = next(rest, b"")
    if not first:
        _log.warning("%s has no end mark: it may be cut short.", printable(shard))
    if first.strip(b"\0") or any(part.strip(b"\0") for part in rest):
        raise UserError(
            f"{printable(shard)} cannot be read as a tar file from byte {place:,} on: it is damaged there, cut short, "
            "or two archives in one file. Pack it again."
        )


def list_members(shard: str) -> list[str]:
    """List the regular files of a tar file as `shard/member`, in the archive's order.

    Raises:
        UserError: `shard` is not a tar file, or is damaged or cut short.
    """
    return [f"{shard}/{member}" for member in _index(shard, _version(shard))]


def read_image_file(name: str | Path) -> bytes:
    """Read a regular file, or a member of a tar file. Nothing is extracted to the disk.

    Raises:
        DecodeError: it does not exist, is no regular file, is too large, or cannot be read.
    """
    shard, member = _parts(str(name))
    if not member:
        return read_file(name)
    shown = printable(str(name))
    try:
        place = _index(shard, _version(shard)).get(member)
    except UserError as error:
        raise DecodeError(str(error)) from None
    if place is None:
        raise DecodeError(f"{shown}: the tar file has no such member.")
    offset, size = place
    if size > MAX_BYTES:
        raise DecodeError(f"{shown}: {size:,} bytes are too many for an image.")
    try:
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DecodeError(f"{shown}: {error.strerror or error}.") from None


def _parts(name: str) -> tuple[str, str]:
    """Take `shard.tar/member` apart; the member is empty for any other name."""
    at = name.find(".tar/") + len(".tar")
    if at < len(".tar") or not os.path.isfile(name[:at]):
        return name, ""
    return name[:at], name[at + 1 :]


def _version(shard: str) -> tuple[int, int]:
    """Return the file's time and size. Both key the cache of indices, so that a changed file is indexed again."""
    try:
        status = os.stat(shard)
    except OSError as error:
        raise UserError(f"{printable(shard)}: {error.strerror or error}.") from None
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def _index(shard: str, version: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return offset and size in bytes by member. If a name comes several times, the last counts, as for tar itself."""
    try:
        with tarfile.open(shard, "r:") as tar:
            found = {
                member.name: (member.offset_data, member.size)
                for member in regular_members(tar, shard)
            }
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{printable(shard)} cannot be read as a tar file: {error}. If it is compressed, unpack it first."
        ) from None
    if found and max(offset + size for offset, size in found.values()) > version[1]:
        raise UserError(f"{printable(shard)} is cut short: its last member ends past its end.")
    return found

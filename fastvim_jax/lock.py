"""Lock a folder or a file, so that only one process at a time writes to it.

The lock is an advisory `flock`, of a folder on a file in it that says who holds it. So the system releases it however
the process ends. Between machines it holds on NFS (Linux clients hand it to the server), on Lustre and
BeeGFS mounted with their flock options, and on GPFS. It does not where a mount answers for its own machine only
(NFS with `local_lock=flock`, Lustre with `localflock`), and where the file system has no locks at all a warning
says so; NFS version 3 may keep the lock of a machine that died until that machine is up again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json

LOCK_FILE = "lock"
_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder. Its file stays.

    Args:
        folder: the folder, which must exist.

    Raises:
        UserError: another process holds it; the message names it.
    """
    descriptor = os.open(folder / LOCK_FILE, _OPEN, 0o644)
    try:
        _hold(descriptor, folder, "run folder")
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_beside(path: Path, kind: str) -> Iterator[None]:
    """Hold a lock that stands for a file or a part of a folder. Its hidden file beside `path` is removed at the end.

    Args:
        path: what only this process may write, whether it exists or not; its folder must exist.
        kind: what it is, for the message.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    file = path.with_name(f".{path.name}.lock")
    descriptor = os.open(file, _OPEN, 0o644)
    try:
        while True:
            _hold(descriptor, path, kind)
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)  # The holder before removed it meanwhile.
            descriptor = os.open(file, _OPEN, 0o644)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _hold(descriptor: int, path: Path, kind: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path} is in use by {_holder(descriptor)}: wait until it ends, or choose another {kind}."
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        _log.warning(
            "%s cannot be locked (%s): see to it that no second process writes there.",
            path, error.strerror,
        )  # fmt: skip
    _sign(descriptor)


def _sign(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # On a full disk the lock still holds, unsigned.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = parse_json(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

"""Read files of object stores through fsspec, with several attempts, and keep them on the local disk."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastvim_jax.data.records import DecodeError
from fastvim_jax.errors import UserError

ATTEMPTS = 4
"""Number of times that a file is requested from an object store, with pauses of 1, 2 and 4 seconds."""

T = TypeVar("T")

_log = logging.getLogger(__name__)
_VERSION = (
    "size", "ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified", "last_modified", "mtime",
    "updated", "generation", "created", "modified", "checksum",
)  # fmt: skip
"""What stores say of a file that changes when its content does; each store knows some of these."""
_FAILURES = 3  # questions without an answer, after which none is asked any more


class KeptFiles:
    """Read files of object stores, and keep each on the local disk for as long as the store's file stays the same.

    A process asks the store once for each file whether it changed. If there is no answer, for example without a
    network, the kept file is used and a warning says so.

    Args:
        folder: where files are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Path] = {}
        self._versions: dict[str, str] = {}
        self._failures = 0

    def read(self, url: str) -> bytes:
        """Return a file's bytes.

        Raises:
            DecodeError, UserError: see `fetch`.
        """
        if url not in self._known:
            self._known[url] = self._current(url)
        try:
            return self._known[url].read_bytes()
        except FileNotFoundError:
            # Temporary folders are cleared, and another process may have found a newer file.
            data = fetch(url)
            _write(self._known[url], data)
            return data

    def version(self, url: str) -> str:
        """Return the store's size, time and checksum of a file, as far as it tells them; a process asks once.

        Raises:
            OSError: there is no such file, or the store refuses it.
            UserError: there is no answer, or fsspec is not installed.
        """
        if url not in self._versions:
            self._versions[url] = _several_attempts(_ask, url)
        return self._versions[url]

    def _current(self, url: str) -> Path:
        """Return where the present version of a file is or will be kept; delete older versions."""
        folder = self.folder / _digest(url)  # its own, because a plate has many files
        kept = list(folder.glob("version-*"))
        version = self._versions.get(url) or self._version(url, warn=bool(kept))
        if version is None and kept:
            return kept[0]
        current = folder / f"version-{_digest(version or '')}"
        if current not in kept:
            _write(current, fetch(url))
            for old in kept:
                old.unlink(missing_ok=True)
        return current

    def _version(self, url: str, *, warn: bool) -> str | None:
        """Ask the store for a file's size, time and checksum. None: there is no answer.

        Args:
            url: of the file.
            warn: say that there is no answer. Without a kept file, `fetch` says why it cannot be read.
        """
        if self._failures >= _FAILURES:
            return None
        try:
            found = _ask(url)
        except Exception as error:  # Each store has errors of its own.
            if not warn:
                return None
            self._failures += 1
            stops = " No more files are asked for." if self._failures == _FAILURES else ""
            _log.warning(
                "%s: whether it changed is not known (%s); the copy on the local disk is used.%s",
                url, error or type(error).__name__, stops,
            )  # fmt: skip
            return None
        self._failures = 0
        return found


def _ask(url: str) -> str:
    """Ask the store once for a file's size, time and checksum; "" if it tells none. Each has errors of its own."""
    import fsspec

    store, path = fsspec.url_to_fs(url)
    try:
        found = store.info(path)
    except NotImplementedError:
        return ""
    return " ".join(f"{key}={found[key]}" for key in _VERSION if found.get(key) is not None)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _write(file: Path, data: bytes) -> None:
    """Write a file as a whole, because several processes may do so at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"partial-{np.random.default_rng().integers(2**63)}")
    partial.write_bytes(data)
    partial.replace(file)


def fetch(url: str) -> bytes:
    """Read a file through fsspec, trying `ATTEMPTS` times.

    Raises:
        DecodeError: the store refuses the file, or none of the attempts succeeded.
        UserError: fsspec, or the package that it needs for this kind of store, is not installed.
    """
    try:
        return _several_attempts(_fetch, url)
    except OSError as error:
        raise DecodeError(f"{url}: {error or type(error).__name__}.") from None
    except _NoAnswer as error:
        raise DecodeError(str(error)) from None


def _fetch(url: str) -> bytes:
    import fsspec

    with fsspec.open(url, "rb") as opened:
        return opened.read()


class _NoAnswer(UserError):
    """A store did not answer in any of the attempts."""


def _several_attempts(ask: Callable[[str], T], url: str) -> T:
    """Return `ask(url)`, trying `ATTEMPTS` times.

    Raises:
        FileNotFoundError, PermissionError: the store refuses the file.
        UserError: there is no answer, or fsspec, or the package that it needs for this kind of store, is not installed.
    """
    if importlib.util.find_spec("fsspec") is None:
        raise UserError(f"{url}: object stores need fsspec: pip install 'fastvim-jax[cells]'.")
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            return ask(url)
        except ImportError as error:
            raise UserError(f"{url}: {error}") from None
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # Each store has errors of its own.
            last = error
    raise _NoAnswer(f"{url}: no answer in {ATTEMPTS} attempts ({last or type(last).__name__}).")

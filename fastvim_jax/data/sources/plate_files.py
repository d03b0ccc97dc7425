"""Find the files that a load_data table names: on disk, or below the URL of the table."""

from __future__ import annotations

import logging
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath

from fastvim_jax.errors import UserError

_log = logging.getLogger(__name__)


class LocalFiles:
    """Find files of a load_data table: at the path that it names, or else by name anywhere below the table's folder.

    Microscopes give the fields of every plate the same names, so the ends of the paths decide. Files of one folder in
    the table agree equally far with their places. A file that agrees less lies in another plate's folder, and its
    own is missing.

    Attributes:
        folder: the table's folder.
        missing: illumination functions that were named and not found.
    """

    def __init__(self, index: str) -> None:
        self.folder = str(Path(index).parent)
        self.missing: set[str] = set()
        self._found: dict[Path, tuple[int, list[str]]] = {}
        # By kind of file and folder in the table: the most parts in which a file's path agrees.
        self._agreement: dict[tuple[str, Path], int] = {}

    def learn(self, rows: Iterable[dict[str, str]], channels: Sequence[str]) -> None:
        """Note how far the paths of the table agree with those of the files. `find` is right only afterwards."""
        for row in rows:
            for kind in ("Orig", "Illum"):
                for channel in channels:
                    told = _told(row, kind, channel)
                    if isinstance(told, Path):
                        parts = self._candidates(told)[0]
                        known = self._agreement.get((kind, told.parent), 0)
                        self._agreement[kind, told.parent] = max(parts, known)

    def find(self, row: dict[str, str], kind: str, channel: str) -> str:
        """Return the path or URL of a channel's file, "" where there is none.

        Raises:
            UserError: several files have its name, and the path in the table does not tell them apart.
        """
        told = _told(row, kind, channel)
        if not isinstance(told, Path):
            return told
        parts, best = self._candidates(told)
        if told.parent.parts and parts < self._agreement.get((kind, told.parent), 0):
            return ""
        if len(best) > 1:
            raise UserError(
                f"{told.name!r} lies in several folders below {self.folder!r}: {best[0]}, {best[1]}. Correct "
                f"PathName_{kind}{channel}, or put each plate's load_data file beside its own images."
            )
        return best[0] if best else ""

    def illumination(self, row: dict[str, str], channel: str) -> str:
        """Return a channel's illumination function, "" where none is named; a named one may not exist."""
        name = row.get(f"FileName_Illum{channel}")
        found = self.find(row, "Illum", channel)
        if not found and name:
            found = f"{self.folder}/{name}"
            self.missing.add(found)
        return found

    def _candidates(self, told: Path) -> tuple[int, list[str]]:
        """Return the files whose paths agree most with one of the table, and the number of last parts that agree."""
        if told not in self._found:
            if exact := self._at(told):
                self._found[told] = len(told.parts), [exact]
            else:
                files = self._by_name.get(told.name, [])
                alike = [(_common_end(told, PurePosixPath(file)), file) for file in files]
                most = max((count for count, _ in alike), default=0)
                self._found[told] = most, [file for count, file in alike if count == most]
        return self._found[told]

    def _at(self, told: Path) -> str:
        """Return the file at this path, as it is or from the table's folder; "" if there is none."""
        return next((str(f) for f in (told, Path(self.folder, told)) if f.is_file()), "")

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _grouped(sorted(_files_below(self.folder)))


class RemoteFiles(LocalFiles):
    """Find files of a load_data table at a URL, as `LocalFiles` does: an object store lists what lies below it.

    Where nothing can be listed, as with http, a relative path counts from the table, and of an absolute one only the
    file's name does; whether the file exists shows when it is read.
    """

    def __init__(self, index: str) -> None:
        super().__init__(index)
        self._web = index.startswith(("http://", "https://"))
        self.folder = (index.partition("?")[0] if self._web else index).rpartition("/")[0]

    def _at(self, told: Path) -> str:
        if self._listed is not None:
            return self._listed.get(f"{self.folder}/{told.as_posix()}", "")
        foreign = told.is_absolute() or any("\\" in part or ":" in part for part in told.parts)
        below = told.name if foreign else told.as_posix()
        return f"{self.folder}/{urllib.parse.quote(below) if self._web else below}"

    @cached_property
    def _listed(self) -> dict[str, str] | None:
        """URLs of all files below the table's folder by folder and path; None if they cannot be listed."""
        if self._web:
            return None
        import fsspec

        try:
            store, root = fsspec.url_to_fs(self.folder)
            names = sorted(store.find(root))
        except Exception as error:  # Each store has errors of its own.
            _log.warning(
                "%s cannot be listed (%s): files are taken to lie where PathName says, seen from there.",
                self.folder, error or type(error).__name__,
            )  # fmt: skip
            return None
        return {
            f"{self.folder}/{name.removeprefix(root.rstrip('/')).lstrip('/')}": store.unstrip_protocol(name)
            for name in names
        }  # fmt: skip

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _grouped(list((self._listed or {}).values()))


def _told(row: dict[str, str], kind: str, channel: str) -> Path | str:
    """Return the path that a row tells of a channel's file; a text if it is a URL, "" if it tells none."""
    if url := row.get(f"URL_{kind}{channel}"):
        return url
    name = row.get(f"FileName_{kind}{channel}")
    if not name:
        return ""
    path = row.get(f"PathName_{kind}{channel}") or ""
    return f"{path.rstrip('/')}/{name}" if "://" in path else Path(path, name)


def _files_below(folder: str) -> Iterator[str]:
    """List the files below a folder, each folder once. Links are followed: images often lie on another disk."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(parent, name) for name in files)


def _grouped(files: list[str]) -> dict[str, list[str]]:
    """Return files by their last part."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(PurePosixPath(file).name, []).append(file)
    return found


def _common_end(a: PurePath, b: PurePath) -> int:
    """Count the last parts in which two paths agree."""
    count = 0
    for one, other in zip(reversed(a.parts), reversed(b.parts), strict=False):
        if one != other:
            break
        count += 1
    return count

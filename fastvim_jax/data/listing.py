"""Hand pipelines and large listings to worker processes as files.

The files and labels of ImageNet are 45 MB when pickled, and 150 MB as Python objects in every worker. Packed into
arrays they are 45 MB in one file, whose pages all processes of a machine share.

Listing a data set takes one call to the file system per folder and per tar shard. Where several processes train
together, one of them lists, and the others receive its listing (`listing_by`).
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, overload

import cloudpickle
import numpy as np

SHARED_FROM = 2**20
"""An array of at least this many bytes goes to workers as a file; a smaller one is pickled as it is."""
_PREFIX = "fastvim-listing-"
_folders: dict[int, Path] = {}

Arrays = Mapping[str, np.ndarray]
Lister = Callable[[Callable[[], Arrays]], Arrays]
_lister: ContextVar[Lister | None] = ContextVar("lister", default=None)


class SharedArray:
    """An array that is pickled as the name of a file with its content.

    Attributes:
        values: the array. In a process that unpickled it from a file, it is a read-only memory map.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._file = ""

    def __getstate__(self) -> dict[str, Any]:
        if self.values.nbytes < SHARED_FROM:
            return {"values": self.values, "_file": ""}
        if not self._file:
            folder = _own_folder()
            descriptor, self._file = tempfile.mkstemp(suffix=".npy", dir=folder)
            with open(descriptor, "wb") as opened:
                np.save(opened, self.values, allow_pickle=False)
        return {"_file": self._file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file:
            self.values = np.load(self._file, mmap_mode="r", allow_pickle=False)


class FiledSequence(Sequence[Any]):
    """A sequence that is pickled as the name of a file with its pickle.

    The reason is a deadlock. A starting process reads its work from a pipe, which holds 64 kB. If the work is larger
    and the process dies before it has read it, its parent waits in the write forever, because both ends of the pipe
    are open in the parent.
    """

    def __init__(self, values: Any) -> None:
        self._values = values
        self._file = ""

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __getstate__(self) -> dict[str, Any]:
        if not self._file:
            descriptor, self._file = tempfile.mkstemp(suffix=".pickle", dir=_own_folder())
            with open(descriptor, "wb") as opened:
                cloudpickle.dump(self._values, opened)
        return {"_file": self._file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._file = state["_file"]
        # Safe to unpickle: this process's parent wrote the file, into a folder that no other user can write to.
        self._values = cloudpickle.loads(Path(self._file).read_bytes())


class Texts(Sequence[str]):
    """A sequence of strings packed into two arrays. Lone surrogates, as in names of files not in UTF-8, are kept."""

    def __init__(self, texts: Iterable[str]) -> None:
        packed = self.pack(texts)
        self._ends, self._bytes = (SharedArray(packed[name]) for name in ("ends", "bytes"))

    @staticmethod
    def pack(texts: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the arrays `ends` and `bytes` that hold the strings."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return {"ends": ends, "bytes": np.frombuffer(b"".join(encoded), np.uint8)}

    @classmethod
    def packed(cls, arrays: Mapping[str, np.ndarray]) -> Texts:
        """Return the strings that `pack` packed."""
        texts = cls(())
        texts._ends, texts._bytes = SharedArray(arrays["ends"]), SharedArray(arrays["bytes"])
        return texts

    def __len__(self) -> int:
        return len(self._ends.values) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = range(len(self))[index]
        start, stop = self._ends.values[place : place + 2]
        return self._bytes.values[start:stop].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def packed_texts(lists: Mapping[str, Iterable[str]]) -> dict[str, np.ndarray]:
    """Pack several lists of strings into one dict of arrays, the form that `listed` passes between processes."""
    packed = {name: Texts.pack(texts) for name, texts in lists.items()}
    return {f"{name}.{part}": array for name, two in packed.items() for part, array in two.items()}


def unpacked_texts(arrays: Arrays) -> dict[str, Texts]:
    """Return the lists that `packed_texts` packed."""
    names = [name.removesuffix(".ends") for name in arrays if name.endswith(".ends")]
    return {
        name: Texts.packed({part: arrays[f"{name}.{part}"] for part in ("ends", "bytes")})
        for name in names
    }


@contextlib.contextmanager
def listing_by(lister: Lister) -> Iterator[None]:
    """Make sources that are opened within the block list through `lister`, which may ask another process."""
    token = _lister.set(lister)
    try:
        yield
    finally:
        _lister.reset(token)


def listed(make: Callable[[], Arrays]) -> Arrays:
    """Return the listing that `make` computes, in this process or in the one that lists for it."""
    lister = _lister.get()
    return make() if lister is None else lister(make)


def _own_folder() -> Path:
    """Return this process's folder for files that its workers read. It is removed when the process ends."""
    number = os.getpid()
    if number not in _folders:
        _remove_left_over()
        _folders[number] = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{_machine()}-{number}-"))
        atexit.register(_remove, number)
    return _folders[number]


def _remove(number: int) -> None:
    if (
        number == os.getpid()
    ):  # A forked child inherits this call and must keep its parent's folder.
        shutil.rmtree(_folders[number], ignore_errors=True)


def _machine() -> str:
    """Return a text for this machine or container, whose numbers of processes say nothing about those of another.

    Machines of a cluster may share the folder for temporary files.
    """
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # Not Linux.
        namespace = ""
    text = f"{platform.node()} {namespace}"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def _remove_left_over() -> None:
    """Remove the folders of this user's processes on this machine that no longer run."""
    own = f"{_PREFIX}{_machine()}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{own}*"):
        number = folder.name.removeprefix(own).partition("-")[0]
        with contextlib.suppress(OSError):
            if number.isdecimal() and folder.stat().st_uid == os.getuid():
                try:
                    os.kill(int(number), 0)
                except ProcessLookupError:
                    shutil.rmtree(folder, ignore_errors=True)

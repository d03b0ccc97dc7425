"""Read and write decoded images in memory-mapped shards, as `fastvim data prepare --pixels` makes them.

A shard `<split>-00000-of-00008.pixels` holds, in this order, with little-endian numbers:

1. the pixels of its records, one after the other, uint8 `h w c` with c of 1 or 3;
2. the index, int64 `records 5`: offset in bytes, height, width, channels, label;
3. the records' names as a JSON list;
4. the trailer: offsets of index and names, uint64, then eight bytes that mark the format (`_MAGIC`).

`manifest.py` describes the manifest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.data.listing import Texts
from fastvim_jax.data.records import Record
from fastvim_jax.data.sources.prepared import PreparedSplit
from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json

FORMAT = "fastvim-pixels-1"
_MAGIC = b"FVPIXEL1"
_TRAILER = 2 * 8 + len(_MAGIC)
_COLUMNS = 5


class PixelWriter:
    """Write one shard; `close` completes it."""

    def __init__(self, file: Path) -> None:
        self._opened = file.open("wb")
        self._index: list[tuple[int, ...]] = []
        self._names: list[str] = []

    def write(self, pixels: np.ndarray, label: int, name: str) -> None:
        """Append the pixels `h w c` of one record."""
        self._index.append((self._opened.tell(), *pixels.shape, int(label)))
        self._names.append(name)
        self._opened.write(np.ascontiguousarray(pixels).data)

    def close(self) -> None:
        """Write index, names and trailer."""
        with self._opened as opened:
            at_index = opened.tell()
            opened.write(np.asarray(self._index, "<i8").reshape(-1, _COLUMNS).tobytes())
            at_names = opened.tell()
            opened.write(json.dumps(self._names, ensure_ascii=False).encode())
            opened.write(np.asarray([at_index, at_names], "<u8").tobytes() + _MAGIC)


class PixelsSource(PreparedSplit):
    """One prepared split. A record's image is a view of the mapped file, so pixels are read when they are used."""

    def __init__(
        self, root: Path, split: str, *, class_list: Path | None = None, any_label: bool = False
    ) -> None:
        super().__init__(root, split, FORMAT, class_list, any_label)
        self._open()

    @property
    def labels(self) -> np.ndarray:
        """Every record's label, known without reading an image."""
        return self._index[:, 4]

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths of all images."""
        return self._index[:, 1], self._index[:, 2]

    def place(self, index: int) -> tuple[int, int, int, int, int, int]:
        """Return a record's file (index in `files`), offset there in bytes, height, width, channels, and label.

        Raises:
            DecodeError: the label is none of the classes.
        """
        shard, place = self._find(index)
        offset, height, width, channels, label = self._index[index].tolist()
        if not (self._any_label or 0 <= label < len(self.class_names)):
            self._check_label(label, self._name(shard, place))
        return shard, offset, height, width, channels, label

    def __getitem__(self, index: int) -> Record:
        shard, offset, height, width, channels, label = self.place(index)
        name = self._name(shard, index - int(self._starts[shard]))
        pixels = self._mapped[shard][offset : offset + height * width * channels]
        shape = (height, width) if channels == 1 else (height, width, channels)
        return Record(pixels.reshape(shape), label, name)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_mapped", "_index", "_names")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _name(self, shard: int, place: int) -> str:
        if shard not in self._names:
            mapped = self._mapped[shard]
            self._names[shard] = Texts(_read_names(mapped, str(self.files[shard])))
        names = self._names[shard]
        known = f" ({names[place]})" if place < len(names) else ""
        return f"{self.files[shard]}[{place}]{known}"

    def _open(self) -> None:
        self._names: dict[int, Texts] = {}
        self._mapped = [np.memmap(file, np.uint8, "r") for file in self.files]
        parts = [
            _read_index(mapped, shard["records"], str(file))
            for mapped, shard, file in zip(self._mapped, self.shards, self.files, strict=True)
        ]
        self._index = np.concatenate([np.zeros((0, _COLUMNS), np.int64), *parts])


def _read_trailer(mapped: np.ndarray, name: str) -> tuple[int, int]:
    """Return where index and names begin.

    Raises:
        UserError: the file is not a shard that `PixelWriter` completed.
    """
    trailer = mapped[-_TRAILER:].tobytes()
    if len(trailer) == _TRAILER and trailer.endswith(_MAGIC):
        at_index, at_names = map(int, np.frombuffer(trailer[:16], "<u8"))
        if at_index <= at_names <= len(mapped) - _TRAILER:
            return at_index, at_names
    raise UserError(f"{name!r} is no shard of pixels, or is damaged: prepare the split again.")


def _read_index(mapped: np.ndarray, records: int, name: str) -> np.ndarray:
    at_index, at_names = _read_trailer(mapped, name)
    content = mapped[at_index:at_names].tobytes()
    if len(content) != records * _COLUMNS * 8:
        raise UserError(f"{name!r} does not hold the {records} records that its manifest says.")
    index = np.frombuffer(content, "<i8").reshape(records, _COLUMNS)
    offset, height, width, channels = index[:, :4].T
    sound = (height > 0) & (width > 0) & ((channels == 1) | (channels == 3)) & (offset >= 0)
    # In floating point, because damaged numbers may overflow.
    end = offset.astype(float) + height.astype(float) * width * channels
    if not (sound & (end <= at_index)).all():
        raise UserError(f"{name!r} has a damaged index: prepare the split again.")
    return index


def _read_names(mapped: np.ndarray, name: str) -> list[str]:
    """Return the names of a shard's records, or none if they are damaged, because only messages need them."""
    _, at_names = _read_trailer(mapped, name)
    try:
        names = parse_json(mapped[at_names:-_TRAILER].tobytes())
    except ValueError:
        return []
    return [str(each) for each in names] if isinstance(names, list) else []

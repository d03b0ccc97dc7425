"""Read ArrayRecord shards with a manifest, as `fastvim data prepare` writes them.

`<root>/<split>.json` is the manifest: format, class names, settings, and each shard's file, number of records, bytes
and SHA-256. A record of `<split>-00000-of-00008.array_record` is one line of JSON, `{"label": 3, "name": "..."}`,
then the image file's bytes.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from fastvim_jax.data.records import DecodeError, Record
from fastvim_jax.data.sources.prepared import PreparedSplit
from fastvim_jax.errors import counted
from fastvim_jax.json_text import parse_json

FORMAT = "fastvim-array-record-1"
# Random access: no thread reads ahead.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecordSource(PreparedSplit):
    """One prepared split. Each process opens the shards when it first reads."""

    def __init__(
        self, root: Path, split: str, *, class_list: Path | None = None, any_label: bool = False
    ) -> None:
        super().__init__(root, split, FORMAT, class_list, any_label)
        self._open()

    def __getitem__(self, index: int) -> Record:
        shard, place = self._find(index)
        name = f"{self.files[shard]}[{place}]"
        header, image = split_record(self._read(shard, place, name), name)
        label = self._check_label(header["label"], name)
        return Record(image, label, f"{name} ({header['name']})")

    def _read(self, shard: int, place: int, name: str) -> bytes:
        from array_record.python.array_record_module import ArrayRecordReader

        # A reader has one position in its file, so threads take turns.
        with self._lock:
            try:
                if shard not in self._readers:
                    reader = ArrayRecordReader(str(self.files[shard]), _OPTIONS)
                    if reader.num_records() != self.shards[shard]["records"]:
                        raise DecodeError(
                            f"{self.files[shard]} holds {counted(reader.num_records(), 'record')}, not what its "
                            "manifest says."
                        )
                    self._readers[shard] = reader
                return self._readers[shard].read([place])[0]
            except (RuntimeError, IndexError) as error:
                raise DecodeError(f"{name}: damaged shard ({error}).") from None

    def _open(self) -> None:
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def join_record(image: bytes, label: int, name: str) -> bytes:
    """Join header and image to the bytes of one record."""
    header = json.dumps({"label": int(label), "name": name}, ensure_ascii=False)
    return header.encode() + b"\n" + image


def split_record(record: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    """Split a record into header and image, the inverse of `join_record`.

    Raises:
        DecodeError: `join_record` did not write this record.
    """
    header, _, image = record.partition(b"\n")
    try:
        fields = parse_json(header)
        return {"label": int(fields["label"]), "name": str(fields["name"])}, image
    except (ValueError, KeyError, TypeError, OverflowError):
        raise DecodeError(f"{name}: not a record that `fastvim data prepare` wrote.") from None

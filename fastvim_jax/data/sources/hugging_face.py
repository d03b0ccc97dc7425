"""A data set's folder as the Hugging Face hub lays it out: Parquet shards of a split, or one folder per class.

`<root>/data/<split>-00000-of-00004.parquet` (or in the root, or in a folder of a config) with an image column, a
struct of `bytes` and `path`, and a whole-number label column whose names stand in the files' `huggingface` metadata.
Without Parquet files: `<root>/<split>/<class>/image.jpg`, as in `image_folder`.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.data.files import read_inside
from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.listing import SharedArray
from fastvim_jax.data.records import DecodeError, Record, Source, printable
from fastvim_jax.data.sources.image_folder import ImageFolderSource
from fastvim_jax.data.sources.labels import list_for, names_of_labels, whole_labels
from fastvim_jax.errors import UserError, counted, suggest
from fastvim_jax.json_text import parse_json

CACHE_BYTES = 256 * 2**20
"""Encoded images that each process keeps of the row groups read last; at least one group is kept."""

_SHARD = re.compile(r"(?P<split>.+?)(-\d+-of-\d+)?")


def open_hugging_face(
    root: Path,
    split: str,
    *,
    class_list: Path | None = None,
    any_label: bool = False,
    follow_links: bool = False,
) -> Source:
    """Open a split of either layout; see the module.

    Raises:
        UserError: when there is no such split.
    """
    shards = parquet_splits(root)
    if shards:
        return ParquetSource(
            root,
            split,
            shards,
            class_list=class_list,
            any_label=any_label,
            follow_links=follow_links,
        )
    return ImageFolderSource(root, split, class_list=class_list, follow_links=follow_links)


class ParquetSource:
    """One split of Parquet shards.

    Parquet is read by row group, so taking records in random order reads a whole group for each record that is
    not cached: a set larger than the cache is better turned into ArrayRecord (`fastvim data prepare`).
    """

    def __init__(
        self,
        root: Path,
        split: str,
        shards: dict[str, list[Path]],
        *,
        class_list: Path | None = None,
        any_label: bool = False,
        follow_links: bool = False,
    ) -> None:
        if split not in shards:
            raise UserError(
                f"No Parquet files of a split {split!r} in {str(root)!r}; splits found there: "
                f"{', '.join(sorted(shards))}." + suggest(split, shards)
            )
        self._root = root
        self._follow_links = follow_links
        self._files = shards[split]
        self._reset()
        schema = self._file(0).schema_arrow
        self._image, self._label, stored_names = _columns(schema, self._files[0])
        classes = list_for(root, class_list, stored_names)
        names = classes.names if classes else stored_names
        labels, self._groups = self._read_layout(names)
        self._labels = SharedArray(labels)
        if not len(labels):
            raise UserError(f"The split {split!r} in {str(root)!r} holds no record.")
        self.class_names = names_of_labels(
            labels,
            f"The split {split!r} in {str(root)!r}",
            stored_names=stored_names,
            classes=classes,
            any_label=any_label,
        )
        self.counts_classes = classes is None and stored_names is None

    @property
    def labels(self) -> np.ndarray:
        """Every record's label, known without reading an image."""
        return self._labels.values

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._groups[:, 2], index, side="right")) - 1
        shard, group, start = (int(v) for v in self._groups[number])
        name = f"{self._files[shard]}[{index - int(self._shard_starts[shard])}]"
        with self._lock:
            images = self._row_group(shard, group, name)
        image = images[index - start].as_py()
        data, path = (image, None) if isinstance(image, bytes) else (None, None)
        if isinstance(image, dict):
            data, path = image.get("bytes"), image.get("path")
        path = path if isinstance(path, str) else None
        name += f" ({printable(path)})" if path else ""
        if data is None and path:
            # Images may lie beside the table.
            data = read_inside(self._root, path, follow_links=self._follow_links)
        if not isinstance(data, bytes):
            raise DecodeError(f"{name}: there is no image in the record.")
        return Record(data, int(self.labels[index]), name)

    def stamp(self, index: int) -> str:
        """Return what changes with a record: its file and label (`fingerprint.Stamped`).

        Not an image beside the table.
        """
        shard = int(np.searchsorted(self._shard_starts, index, side="right")) - 1
        file = self._files[shard]
        return f"{file_stamp(file)} {self.labels[index]} {file.name}[{index}]"

    def _read_layout(self, names: tuple[str, ...] | None) -> tuple[np.ndarray, np.ndarray]:
        """Read every label, and shard, group and first record of each row group."""
        labels, groups, starts, total = [], [], [], 0
        for shard, file in enumerate(self._files):
            parquet = self._file(shard)
            starts.append(total)
            for group in range(parquet.num_row_groups):
                groups.append((shard, group, total))
                total += parquet.metadata.row_group(group).num_rows
            if self._label not in parquet.schema_arrow.names:
                raise UserError(f"{str(file)!r} lacks the column {self._label!r}.")
            column = parquet.read(columns=[self._label], use_threads=False).column(0)
            labels.append(whole_labels(_values(column, file), repr(str(file)), names))
        self._shard_starts = np.asarray(starts, np.int64)
        return np.concatenate(labels), np.asarray(groups, np.int64).reshape(-1, 3)

    def _row_group(self, shard: int, group: int, name: str) -> Any:
        key = (shard, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        try:
            table = self._file(shard).read_row_group(
                group, columns=[self._image], use_threads=False
            )
        except (OSError, ValueError) as error:
            raise DecodeError(f"{name}: damaged Parquet file ({error}).") from None
        images = table.column(0).combine_chunks()
        self._cache[key] = images
        while len(self._cache) > 1 and sum(i.nbytes for i in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return images

    def _file(self, shard: int) -> Any:
        if shard not in self._opened:
            parquet = _import()
            file = self._files[shard]
            try:
                self._opened[shard] = parquet.ParquetFile(file)
            except (OSError, ValueError) as error:
                raise UserError(f"{str(file)!r} cannot be read as Parquet: {error}") from None
        return self._opened[shard]

    def _reset(self) -> None:
        self._opened: dict[int, Any] = {}
        self._cache: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_opened", "_cache", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _import() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"Parquet files need the package pyarrow ({error}): pip install 'fastvim-jax[data]'."
        ) from None
    return parquet


def parquet_splits(root: Path) -> dict[str, list[Path]]:
    """List the Parquet files of each split: in `data`, in the root, or in the only config's folder."""
    for folder in (root / "data", root):
        files = sorted(folder.glob("*.parquet"))
        if files:
            return _by_split(files)
    folders = sorted({file.parent for file in root.glob("*/*.parquet")})
    if len(folders) > 1:
        raise UserError(
            f"{str(root)!r} holds several configs: {', '.join(f.name for f in folders)}. "
            "Add one to data.path."
        )
    return _by_split(sorted(folders[0].glob("*.parquet"))) if folders else {}


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    shards: dict[str, list[Path]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.stem)
        shards.setdefault(match["split"] if match else file.stem, []).append(file)
    return shards


def _columns(schema: Any, file: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """Find the image column, the label column, and the class names if the metadata have them."""
    features = _features(schema)
    kinds = {n: f.get("_type") for n, f in features.items() if isinstance(f, dict)}
    images = [n for n in schema.names if kinds.get(n) == "Image"]
    labels = [n for n in schema.names if kinds.get(n) == "ClassLabel"]
    images = images or [f.name for f in schema if _holds_image(f.type)]
    numbers = [f.name for f in schema if str(f.type).lstrip("u").startswith("int")]
    usual = [n for n in schema.names if n in ("label", "labels", "fine_label")]
    labels = labels or [n for n in numbers if n in usual] or numbers or usual
    image = "image" if "image" in images else next(iter(images), None)
    # Of several labels, the one called so, or else the finest.
    known = {n: _names(features.get(n)) for n in labels}
    best = max(labels, key=lambda n: len(known[n] or ()), default=None)
    label = "label" if "label" in labels else best
    if image is None or label is None:
        raise UserError(
            f"{str(file)!r} has no {'image' if image is None else 'whole-number label'} column; "
            f"its columns are {', '.join(schema.names)}."
        )
    return image, label, known[label]


def _values(column: Any, file: Path) -> np.ndarray:
    """Return a label column as an array; -1 where a record has no label."""
    if str(column.type).startswith("int"):
        column = column.fill_null(-1)
    elif column.null_count:
        raise UserError(
            f"{str(file)!r}: {counted(column.null_count, 'record has', 'records have')} no label."
        )
    values = column.to_numpy()
    return np.asarray(values.tolist()) if values.dtype == object else values


def _names(feature: Any) -> tuple[str, ...] | None:
    """Return the class names that a column's metadata give, if they are a list as they should be."""
    names = feature.get("names") if isinstance(feature, dict) else None
    return (
        tuple(printable(str(name)) for name in names) if isinstance(names, list) and names else None
    )


def _features(schema: Any) -> dict[str, Any]:
    try:
        found = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _holds_image(kind: Any) -> bool:
    text = str(kind)
    return text in ("binary", "large_binary") or (text.startswith("struct<") and "bytes:" in text)

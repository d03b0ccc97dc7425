"""Read tar shards in the WebDataset layout: members `key.jpg` beside `key.cls` or `key.json`.

Every image of a shard is a record. Its label is in the file of the image's own name (`scan.2024.01.png` beside
`scan.2024.01.cls`), or else in the file of its key (`c.left.png` and `c.right.png` beside `c.cls`).

The shards of `train` are `train.tar`, `train-0000.tar`, `train_000.tar`, `train-00000-of-00010.tar`: the split's name,
then only numbers. So `train-extra-0000.tar` belongs to `train-extra`.

All headers of a shard are read once, when the split is opened. Images are then read by their offsets, so access is
random and shards may differ in length.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from fastvim_jax.data.files import MAX_BYTES, require_regular
from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.listing import SharedArray, Texts, listed
from fastvim_jax.data.records import DecodeError, Record, printable
from fastvim_jax.data.sources.image_folder import EXTENSIONS
from fastvim_jax.data.sources.labels import list_for, names_of_labels
from fastvim_jax.data.tar_members import regular_members
from fastvim_jax.errors import UserError, counted, suggest
from fastvim_jax.json_text import parse_json

_MOST_LABEL_BYTES = 2**24
# The numbers at the end of a name, such as `-0001`, `_1-2` and `-00000-of-00010`.
_NUMBERS = re.compile(r"(?<![\d._-])[\d._-]*(?:(?<=\d)[._-]of[._-]\d+)?$")


class WebDatasetSource:
    """One split: the shards of its name. Labels are whole numbers, in `.cls` or as `label` in `.json`."""

    def __init__(
        self, root: Path, split: str, *, class_list: Path | None = None, any_label: bool = False
    ) -> None:
        self._shards = sorted(file for file in root.glob("*.tar") if _of_split(file, split))
        if not self._shards:
            names = shard_splits(root)
            raise UserError(
                f"No tar shards of a split {split!r} in {str(root)!r}; splits found there: "
                f"{', '.join(names) or 'none'}." + suggest(split, names)
            )

        def list_images() -> dict[str, np.ndarray]:
            keys: list[str] = []
            places: list[tuple[int, int, int, int]] = []
            for number, shard in enumerate(self._shards):
                for key, offset, size, label in _index(shard):
                    keys.append(key)
                    places.append((number, offset, size, label))
            return {**Texts.pack(keys), "places": np.asarray(places, np.int64)}

        found = listed(list_images)
        self._keys, self._places = Texts.packed(found), SharedArray(found["places"])
        if not len(self._keys):
            raise UserError(f"The tar shards of {split!r} in {str(root)!r} hold no labelled image.")
        classes = list_for(root, class_list)
        self.class_names = names_of_labels(
            self.labels,
            f"The tar shards of {split!r} in {str(root)!r}",
            classes=classes,
            any_label=any_label,
        )
        self.counts_classes = classes is None

    @property
    def labels(self) -> np.ndarray:
        """Every record's label, known without reading an image."""
        return self._places.values[:, 3]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Record:
        number, offset, size, label = (int(v) for v in self._places.values[index])
        shard = self._shards[number]
        name = printable(f"{shard}/{self._keys[index]}")
        if size > MAX_BYTES:
            raise DecodeError(f"{name}: {size:,} bytes are too many for an image.")
        with shard.open("rb") as file:
            file.seek(offset)
            return Record(file.read(size), label, name)

    def stamp(self, index: int) -> str:
        """Return a text that changes when a record does: its shard, place there and label (`fingerprint.Stamped`)."""
        number, *place = (int(v) for v in self._places.values[index])
        shard = self._shards[number]
        return f"{file_stamp(shard)} {place} {shard.name}/{self._keys[index]}"


def shard_splits(root: Path) -> list[str]:
    """List the splits in a folder of shards: their names without the trailing numbers."""
    return sorted({file.stem[: _numbers(file.stem).start()] for file in root.glob("*.tar")})


def _of_split(shard: Path, split: str) -> bool:
    """Return whether only numbers follow the split's name. `fold10.tar` does not belong to the split `fold1`."""
    stem = shard.stem
    cut = stem[len(split) - 1 : len(split) + 1] if split else ""
    return (
        stem.startswith(split)
        and _numbers(stem).start() <= len(split)
        and not (len(cut) == 2 and cut.isdigit())
    )


def _numbers(stem: str) -> re.Match[str]:
    """Return the numbers at the end of a shard's name, empty if there are none."""
    match = _NUMBERS.search(stem)
    assert match is not None
    return match


def _index(shard: Path) -> list[tuple[str, int, int, int]]:
    """List name, offset, size in bytes and label of each image of a shard, in the shard's order."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, list[int]] = {}
    bad: dict[str, str] = {}
    try:
        require_regular(shard)
        with tarfile.open(shard, "r:") as tar:
            for member in regular_members(tar, str(shard)):
                stem, extension = _split(member.name)
                if extension in EXTENSIONS:
                    images.append((member.name, member.offset_data, member.size))
                elif extension in (".cls", ".json") and member.size <= _MOST_LABEL_BYTES:
                    content = tar.extractfile(member)
                    label = _label(content.read() if content else b"", extension)
                    if label is None:
                        bad[stem] = member.name
                    else:
                        labels.setdefault(stem, []).append(label)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{str(shard)!r} cannot be read as a tar file: {error}") from None
    return _labelled(shard, images, labels, bad)


def _labelled(
    shard: Path,
    images: list[tuple[str, int, int]],
    labels: dict[str, list[int]],
    bad: dict[str, str],
) -> list[tuple[str, int, int, int]]:
    """Give each image the label of its own name, or else of its key.

    Where a name comes several times, its nth image gets the nth label.
    """
    found, met = [], Counter[str]()
    missing: list[str] = []
    for name, offset, size in images:
        met[name] += 1
        stem = _split(name)[0]
        of_name = labels.get(stem) or labels.get(_key(stem))
        if of_name is None:
            missing.append(name)
        elif len(of_name) > 1 and len(of_name) < met[name]:
            raise UserError(
                f"{str(shard)!r} holds {printable(name)} more often than its label: pack the shard again."
            )
        else:
            found.append((name, offset, size, of_name[min(met[name], len(of_name)) - 1]))
    if missing:
        first = missing[0]
        wrong = bad.get(_split(first)[0]) or bad.get(_key(_split(first)[0]))
        cause = f" ({printable(wrong)} holds no whole number as its label)" if wrong else ""
        raise UserError(
            f"{str(shard)!r}: {counted(len(missing), 'image has', 'images have')} no label in a .cls or .json file "
            f"beside them, among them {printable(first)}{cause}."
        )
    return found


def _split(member: str) -> tuple[str, str]:
    """Split a member's name into stem and last extension, which is returned in lower case."""
    stem, extension = posixpath.splitext(member)
    return stem, extension.lower()


def _key(stem: str) -> str:
    """Return the key as WebDataset defines it: up to the first dot of the file's name. Dots of folders do not count."""
    folder, _, name = stem.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}" if folder else name.partition(".")[0]


def _label(content: bytes, extension: str) -> int | None:
    """Return the label as a whole number, or None if the content holds none."""
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except ValueError:
        return None
    if extension == ".json":
        value = value.get("label") if isinstance(value, dict) else None
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if valid else None

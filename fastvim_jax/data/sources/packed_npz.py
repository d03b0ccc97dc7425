"""Read encoded images that are packed into one `.npz` per split.

Members:

- `jpeg`: uint8, the bytes of all image files, one after the other.
- `offsets`: n + 1 integers; image i is `jpeg[offsets[i]:offsets[i + 1]]`.
- `labels`: n integers.
- `names`: optionally, n texts.

`classes.txt` or `classes.tsv` beside the `.npz` names the classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.data.records import Record
from fastvim_jax.data.sources.labels import list_for, names_of_labels, whole_labels
from fastvim_jax.errors import UserError, suggest

_MEMBERS = ("jpeg", "offsets", "labels")


class PackedNpzSource:
    """One split, `<root>/<split>.npz`, held in memory as encoded bytes."""

    def __init__(
        self, root: Path, split: str, *, class_list: Path | None = None, any_label: bool = False
    ) -> None:
        self._file = root / f"{split}.npz"
        if not self._file.is_file():
            splits = sorted(file.stem for file in root.glob("*.npz"))
            raise UserError(
                f"{str(self._file)!r} does not exist; splits found there: {', '.join(splits) or 'none'}."
                + suggest(split, splits)
            )
        self._classes = list_for(root, class_list)
        self._open()
        names = names_of_labels(
            self._labels, repr(str(self._file)), classes=self._classes, any_label=any_label
        )
        self.class_names = names
        self.counts_classes = self._classes is None

    @property
    def labels(self) -> np.ndarray:
        """Every record's label, known without reading an image."""
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._members["offsets"][index : index + 2]
        names = self._members.get("names")
        name = str(names[index]) if names is not None else ""
        return Record(
            self._members["jpeg"][start:stop].tobytes(),
            int(self._labels[index]),
            f"{self._file}[{index}]" + (f" ({name})" if name else ""),
        )

    def __getstate__(self) -> dict[str, Any]:
        # Workers read the file again, which costs less than sending the images through a pipe.
        return {k: v for k, v in self.__dict__.items() if k not in ("_members", "_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._members = _read_members(self._file)
        names = self._classes.names if self._classes else None
        self._labels = whole_labels(self._members.pop("labels"), repr(str(self._file)), names)
        _check(self._members, len(self._labels), repr(str(self._file)))


def _read_members(file: Path) -> dict[str, np.ndarray]:
    """Read each member once, because every indexing of an npz object decompresses the member again."""
    name = repr(str(file))
    try:
        with file.open("rb") as opened:
            if opened.read(4) not in (b"PK\3\4", b"PK\5\6", b"\x93NUM"):
                raise UserError(f"{name} cannot be read as .npz: it is no such archive.")
            opened.seek(0)
            packed = np.load(opened, allow_pickle=False)
            if not isinstance(packed, np.lib.npyio.NpzFile):
                raise UserError(f"{name} holds one array, not the arrays of the packed layout.")
            with packed:
                missing = [member for member in _MEMBERS if member not in packed.files]
                if missing:
                    raise UserError(
                        f"{name} lacks the arrays {', '.join(missing)} of the packed layout."
                    )
                wanted = [m for m in (*_MEMBERS, "names") if m in packed.files]
                return {member: packed[member] for member in wanted}
    except UserError:
        raise
    # Damaged archives raise BadZipFile, zlib.error, EOFError, KeyError, MemoryError, ...; pickled arrays ValueError.
    except Exception as error:
        cause = str(error)
        if "allow_pickle" in cause or "pickle" in cause.lower():
            cause = "it holds pickled objects, which could run code and are never read; store plain arrays"
        raise UserError(
            f"{name} cannot be read as .npz: {cause or type(error).__name__}."
        ) from None


def _check(members: dict[str, np.ndarray], count: int, name: str) -> None:
    """Refuse arrays that do not fit each other."""
    jpeg, offsets = members["jpeg"], members["offsets"]
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1:
        raise UserError(
            f"{name}: jpeg must be uint8 bytes in one row, not {jpeg.dtype} {jpeg.shape}."
        )
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise UserError(
            f"{name}: offsets must be integers in one row, not {offsets.dtype} {offsets.shape}."
        )
    if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != len(jpeg):
        raise UserError(f"{name}: offsets do not fit {count} labels and {len(jpeg)} bytes.")
    if (offsets[1:] < offsets[:-1]).any():
        raise UserError(f"{name}: offsets are not in order.")
    names = members.get("names")
    if names is not None and (
        names.ndim != 1 or len(names) != count or names.dtype.kind not in "SU"
    ):
        raise UserError(f"{name}: names must be {count} texts, not {names.dtype} {names.shape}.")

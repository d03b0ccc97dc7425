"""Encoded images packed into one `.npz` per split.

Members: `jpeg` uint8, all files one after the other; `offsets` int64, n + 1 long, image i being
`jpeg[offsets[i]:offsets[i + 1]]`; `labels`, n integers; optionally `names`. `classes.txt` or
`classes.tsv` beside it names the classes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.data.records import Record
from fastvim_jax.data.sources.labels import names_of_labels
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
        self._members = _read_members(self._file)
        self.class_names = names_of_labels(
            self._members["labels"],
            repr(str(self._file)),
            root=root,
            class_list=class_list,
            any_label=any_label,
        )

    @property
    def labels(self) -> np.ndarray:
        """Every record's label, known without reading an image."""
        return self._members["labels"]

    def __len__(self) -> int:
        return len(self._members["labels"])

    def __getitem__(self, index: int) -> Record:
        start, stop = self._members["offsets"][index : index + 2]
        names = self._members.get("names")
        name = str(names[index]) if names is not None else ""
        return Record(
            self._members["jpeg"][start:stop].tobytes(),
            int(self._members["labels"][index]),
            f"{self._file}[{index}]" + (f" ({name})" if name else ""),
        )

    def __getstate__(self) -> dict[str, Any]:
        # Workers read the file again: cheaper than sending the images through a pipe.
        return {**self.__dict__, "_members": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _members=_read_members(state["_file"]))


def _read_members(file: Path) -> dict[str, np.ndarray]:
    """Read each member once: indexing an npz object again would decompress it again."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as packed:
            missing = [name for name in _MEMBERS if name not in packed.files]
            if missing:
                raise UserError(
                    f"{str(file)!r} lacks the arrays {', '.join(missing)} of the packed layout."
                )
            members = {name: packed[name] for name in (*_MEMBERS, "names") if name in packed.files}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {error}") from None
    offsets, count = members["offsets"], len(members["labels"])
    if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != len(members["jpeg"]):
        raise UserError(
            f"{str(file)!r}: offsets do not fit {count} labels and {len(members['jpeg'])} bytes."
        )
    if (np.diff(offsets) < 0).any():
        raise UserError(f"{str(file)!r}: offsets are not in order.")
    return members

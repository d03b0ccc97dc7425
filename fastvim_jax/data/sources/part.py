"""A part of a split, written as a Python slice behind its name: `train[5000:]`, `train[:5000]`, `test[-100:]`."""

from __future__ import annotations

import re

import numpy as np

from fastvim_jax.data.fingerprint import fingerprint
from fastvim_jax.data.records import Record, Source
from fastvim_jax.errors import UserError

_PART = re.compile(r"(?P<split>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


def split_and_part(name: str) -> tuple[str, slice | None]:
    """`train[5000:]` → the split's own name and the slice; a name without a slice → itself and None.

    Raises:
        UserError: for brackets that hold no slice.
    """
    if not name.endswith("]"):
        return name, None
    match = _PART.fullmatch(name)
    try:
        if match is None:
            raise ValueError
        bounds = (int(match[side]) if match[side] else None for side in ("start", "stop"))
        return match["split"], slice(*bounds)
    except ValueError:
        raise UserError(
            f"The split {name!r} has no part that can be read: write it like train[5000:] or train[:5000]."
        ) from None


class SourcePart:
    """The records of a source from one number to another.

    Raises:
        UserError: when the part is empty.
    """

    def __init__(self, source: Source, part: slice, name: str) -> None:
        self._source = source
        self._numbers = range(len(source))[part]
        if not self._numbers:
            raise UserError(f"The split {name!r} is empty: the whole holds {len(source)} images.")

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label of the whole source."""
        return self._source.class_names

    @property
    def labels(self) -> np.ndarray | None:
        """The part's labels, if the whole knows its own."""
        labels = getattr(self._source, "labels", None)
        return None if labels is None else labels[list(self._numbers)]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._numbers[index]]

    def stamp(self, index: int) -> str:
        """Return what changes with a record (`fingerprint.Stamped`), whether the whole knows it or must be read."""
        number = self._numbers[index]
        return fingerprint(self._source, number, number + 1)

"""A part of a split, written behind its name: `train[5000:]`, `train[:5000]`, `test[-100:]`, `train[1/10]`.

`train[1/10]` is every tenth record of each class, beginning with the first, `train[2/10]` beginning with the second;
`train[-1/10]` are all records but those of `train[1/10]`. Such parts are stratified: each class keeps its share.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvim_jax.data.fingerprint import fingerprint
from fastvim_jax.data.records import Record, Source, read_record
from fastvim_jax.errors import UserError

Part = slice | tuple[int, int]
"""A slice, or number and count of a stratified part; a negative number: all others."""

_STRATIFIED = re.compile(r"(?P<split>.+)\[(?P<number>-?\d{1,6})/(?P<count>\d{1,6})\]")
_PART = re.compile(r"(?P<split>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


def split_and_part(name: str) -> tuple[str, Part | None]:
    """Split `train[5000:]` into the split's own name and the slice; without a slice, return the name and None.

    Raises:
        UserError: for brackets that hold no slice.
    """
    if not name.endswith("]"):
        return name, None
    stratified = _STRATIFIED.fullmatch(name)
    if stratified:
        number, count = int(stratified["number"]), int(stratified["count"])
        if not (count >= 2 and 1 <= abs(number) <= count):
            raise UserError(
                f"The split {name!r} has no such part: write it like train[1/10], and train[-1/10] for all others."
            )
        return stratified["split"], (number, count)
    match = _PART.fullmatch(name)
    try:
        if match is None:
            raise ValueError
        bounds = (int(match[side]) if match[side] else None for side in ("start", "stop"))
        return match["split"], slice(*bounds)
    except ValueError:
        raise UserError(
            f"The split {name!r} has no part that can be read: write it like train[5000:] or train[:5000], "
            "train[1/10] or train[-1/10]."
        ) from None


class SourcePart:
    """The records of a source from one number to another.

    Raises:
        UserError: when the part is empty.
    """

    def __init__(self, source: Source, part: Part, name: str) -> None:
        self._source = source
        self._numbers: Sequence[int] = (
            range(len(source))[part] if isinstance(part, slice) else _stratified(source, *part)
        )
        if not len(self._numbers):
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

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the channels in order, if the whole knows them."""
        return tuple(getattr(self._source, "channel_names", ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what the whole source left out, if it knows."""
        return tuple(getattr(self._source, "notes", ()))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._numbers[index]]

    def origin(self, index: int) -> tuple[Source, int]:
        """Return the whole source, and a record's number there."""
        return self._source, self._numbers[index]

    def stamp(self, index: int) -> str:
        """Return what changes with a record (`fingerprint.Stamped`), whether the whole knows it or must be read."""
        number = self._numbers[index]
        return fingerprint(self._source, number, number + 1)


def unwrapped(source: Source, index: int) -> tuple[Any, int]:
    """Return the source that a record of a part of it, or of a part of a part, comes from, and its number there."""
    while isinstance(source, SourcePart):
        source, index = source.origin(index)
    return source, index


def _stratified(source: Source, number: int, count: int) -> list[int]:
    """Return the records of a stratified part, in order; labels that the source does not know are read."""
    labels = getattr(source, "labels", None)
    if labels is None:
        labels = [read_record(source, index).target for index in range(len(source))]
    met: Counter[int] = Counter()
    chosen = []
    for index, label in enumerate(map(int, labels)):
        inside = met[label] % count == abs(number) - 1
        met[label] += 1
        if inside == (number > 0):
            chosen.append(index)
    return chosen

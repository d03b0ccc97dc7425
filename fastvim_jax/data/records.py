"""What a source yields, and the one protocol every source follows."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastvim_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """One image and what is known of it, as the source holds them."""

    image: bytes | np.ndarray
    """An encoded file's bytes (JPEG, PNG, ...), or uint8 pixels `h w` or `h w c`."""
    target: Any
    """What a model is to predict. For classification an int, the index into the source's `class_names`; sources of
    other tasks hold a mask or boxes here."""
    name: str
    """Where the record comes from (a path, or `file[index]`): error messages name it."""


@runtime_checkable
class Source(Protocol):
    """Random access to records. Sources are pickled to worker processes, so they stay light."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label, in label order."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class DecodeError(UserError):
    """An image that cannot be decoded. The message names the record and the cause."""

"""Define the record that every source returns, and the protocol that every source follows."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastvim_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """One image with its target, as the source holds them."""

    image: bytes | np.ndarray
    """An encoded file's bytes (JPEG, PNG, ...), or uint8 pixels `h w` or `h w c`."""
    target: Any
    """The value to predict: for classification an index into the source's `class_names`, for other tasks a mask or
    boxes."""
    name: str
    """Origin of the record (a path, or `file[index]`), for error messages."""
    note: str = ""
    """A warning about a record that is used nevertheless, such as a saturated channel; "" if there is none."""


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


def read_record(source: Source, index: int) -> Record:
    """Read one record, whatever damaged files make their readers raise.

    Raises:
        DecodeError: naming the record and the cause.
    """
    try:
        return source[index]
    except UserError as error:
        raise DecodeError(str(error)) from None
    except OSError as error:
        raise DecodeError(f"{printable(str(error.filename))}: {error.strerror or error}.") from None
    except Exception as error:
        raise DecodeError(
            f"record {index} cannot be read ({type(error).__name__}: {printable(str(error))})."
        ) from None


def printable(name: str) -> str:
    """Return a file's name with bytes that are not UTF-8 written out, so that it can be printed and stored."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except (
        UnicodeEncodeError
    ):  # Halves of surrogate pairs that stand for no byte, as JSON may hold them.
        return name.encode("utf-8", "backslashreplace").decode()

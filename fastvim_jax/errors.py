"""Define errors for the user: they say what went wrong and how to mend it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input. The message names the cause and the fix; the command line prints it without a traceback."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the choices nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(str(name), [str(c) for c in choices], n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def require_texts(values: Iterable[str], name: str) -> tuple[str, ...]:
    """Return texts as a tuple. A single text is refused, because Python would take it for a list of its letters.

    Args:
        values: the texts.
        name: of the argument, for the message.

    Raises:
        UserError: `values` is a single text, or holds something else.
    """
    if isinstance(values, str):
        raise UserError(f"{name}={values!r} must be a list; for one: {name}=[{values!r}].")
    found = tuple(values)
    if wrong := [value for value in found if not isinstance(value, str)]:
        raise UserError(f"{name} must hold texts; it holds {wrong[0]!r}.")
    return found


def one_or_several(files: Any) -> list[Any]:
    """Return paths as a list, also if there is only one, not in a list."""
    return [files] if isinstance(files, str | os.PathLike) else list(files)


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, or noun and verb: "1 file", "2 files"; "1 class has", "2 classes have"."""
    return f"{count} {one if count == 1 else many or one + 's'}"

"""Reading a subcommand's arguments with tyro, and telling wrong usage from failure."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from fastvim_jax.errors import UserError

T = TypeVar("T")


class UsageError(UserError):
    """Wrong arguments: exit status 2, where other errors of the user's exit with 1."""


@contextlib.contextmanager
def as_usage_error() -> Iterator[None]:
    """Make a UserError raised inside one about the arguments."""
    try:
        yield
    except UsageError:
        raise
    except UserError as error:
        raise UsageError(str(error)) from error


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 file", "2 files"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def command() -> str:
    """Return how the user can call this program: `fastvim` if the shell finds it, otherwise through Python."""
    beside = Path(sys.executable).with_name("fastvim")
    found = shutil.which("fastvim")
    if found and Path(found).absolute() == beside.absolute():
        return "fastvim"
    python = os.path.relpath(sys.executable)
    return f"{shlex.quote(sys.executable if python.startswith('..') else python)} -m fastvim_jax"


def parse(kind: Callable[..., T], prog: str, arguments: Sequence[str], description: str) -> T:
    """Read `arguments` into the dataclass `kind`; tyro prints help or names the wrong field, and exits.

    Raises:
        UsageError: when the dataclass refuses a value.
        SystemExit: with status 0 after help, 2 after an error.
    """
    # Imported here: the list of commands must not wait for it.
    import tyro

    with as_usage_error():
        return tyro.cli(kind, prog=f"fastvim {prog}", args=list(arguments), description=description)

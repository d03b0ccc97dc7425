"""Read a subcommand's arguments with tyro, and tell wrong usage from failure."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from fastvim_jax.errors import UserError

T = TypeVar("T")
_EMPTY = ("None", "", "''")


class UsageError(UserError):
    """Wrong arguments. The command exits with status 2; after any other `UserError` it exits with status 1."""


@contextlib.contextmanager
def as_usage_error() -> Iterator[None]:
    """Turn any `UserError` raised inside into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except UserError as error:
        raise UsageError(str(error)) from error


def require_picture(file: Path | None, option: str = "--plot") -> None:
    """Make the folder of a picture, before what it shows is computed.

    Raises:
        UsageError: the file's name does not end in .png, .pdf or .svg, or its folder cannot be made.
    """
    if file is None:
        return
    if file.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"{option} {file}: name a file that ends in .png, .pdf or .svg.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror or error}.") from None


def command() -> str:
    """Return what to type to call this program: `fastvim` if the shell finds it, otherwise `python -m fastvim_jax`."""
    beside = Path(sys.executable).with_name("fastvim")
    found = shutil.which("fastvim")
    if found and Path(found).absolute() == beside.absolute():
        return "fastvim"
    python = os.path.relpath(sys.executable)
    return f"{shlex.quote(sys.executable if python.startswith('..') else python)} -m fastvim_jax"


def parse(kind: Callable[..., T], prog: str, arguments: Sequence[str], description: str) -> T:
    """Read `arguments` into the dataclass `kind`; tyro prints help or names the wrong field, and exits.

    Args:
        kind: a dataclass; the strings beneath its fields are the options' help.
        prog: name of the subcommand, for the first line of the help.
        arguments: what follows the subcommand.
        description: what the subcommand does, for the help.

    Raises:
        UsageError: the dataclass refuses a value.
        SystemExit: with status 0 after help, 2 after an error.
    """
    # Import tyro only here, because `fastvim --help` must not wait for it.
    import tyro

    _hide_empty_defaults(kind)
    with as_usage_error(), _join_lines_of_help():
        return tyro.cli(kind, prog=f"fastvim {prog}", args=list(arguments), description=description)


def _hide_empty_defaults(kind: Callable[..., Any]) -> None:
    """Keep tyro from adding "(default: None)" or "(default: )" to the help of a command's own options.

    Their help says in words what happens by default. Fields of configs keep the hint, because None is a value there.
    """
    import tyro

    hint = tyro.conf.arg(
        help_behavior_hint=lambda default: "" if default in _EMPTY else f"(default: {default})"
    )
    hints = get_type_hints(kind, include_extras=True)
    for part in getattr(kind, "__mro__", ()):
        if not part.__module__.startswith("fastvim_jax.cli"):
            continue
        own = part.__annotations__
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            if field.name in own and isinstance(own[field.name], str):  # Not done yet.
                own[field.name] = Annotated[hints[field.name], hint]


@contextlib.contextmanager
def _join_lines_of_help() -> Iterator[None]:
    """Give tyro the string beneath each field as one line per paragraph.

    tyro 1.0 keeps the line breaks of an indented string, so the help would break lines in the middle of a sentence.
    """
    import docstring_parser

    original = docstring_parser.parse_from_object

    def parse_from_object(kind: Any, *options: Any) -> docstring_parser.Docstring:
        parsed = original(kind, *options)
        for field in parsed.params:
            paragraphs = (field.description or "").split("\n\n")
            field.description = "\n\n".join(" ".join(text.split()) for text in paragraphs)
        return parsed

    docstring_parser.parse_from_object = parse_from_object  # type: ignore[assignment]
    try:
        yield
    finally:
        docstring_parser.parse_from_object = original

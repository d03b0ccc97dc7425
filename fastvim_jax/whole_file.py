"""Write a file that takes its place only when all of it is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastvim_jax.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path, *errors: type[Exception]) -> Iterator[Path]:
    """Yield the path of a file to write, beside `path`. At the end it replaces a file that is there already.

    Args:
        path: where the file lies at the end.
        *errors: what the writing library raises, besides `OSError`, if a file cannot be written.

    Raises:
        UserError: the file cannot be written. Nothing is left of it, and an earlier file is as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, (OSError, *errors)):
            raise
        raise UserError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from error

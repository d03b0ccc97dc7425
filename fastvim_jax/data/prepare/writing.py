"""Explain to the user why shards cannot be written."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastvim_jax.errors import UserError

_FULL = re.compile(r"No space left|quota exceeded|File too large", re.IGNORECASE)


@contextlib.contextmanager
def explain_shard_errors(folder: Path) -> Iterator[None]:
    """Turn what hinders writing in a folder into an error for the user; only writing may stand inside.

    Raises:
        UserError: for an OSError, or the RuntimeError that the ArrayRecord writer makes of one, with the cause.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{str(folder)!r} cannot be a folder for shards: it is a file, or lies in one. Choose another --out."
        ) from None
    except (OSError, RuntimeError) as error:
        cause = getattr(error, "strerror", None) or str(error).partition(";")[0]
        if _FULL.search(cause):
            cause += _room(folder)
        raise UserError(
            f"{str(folder)!r} could not be written: {cause}. Mend that and give the same command again "
            "(finished shards are kept), or choose another --out."
        ) from error


def _room(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB free)"
    except OSError:
        return ""

"""Read files of object stores through fsspec, with several attempts."""

from __future__ import annotations

import time

from fastvim_jax.data.records import DecodeError
from fastvim_jax.errors import UserError

ATTEMPTS = 4
"""Number of times that a file is requested from an object store, with pauses of 1, 2 and 4 seconds."""


def fetch(url: str) -> bytes:
    """Read a file through fsspec, trying `ATTEMPTS` times.

    Raises:
        DecodeError: the store refuses the file, or none of the attempts succeeded.
        UserError: fsspec, or the package that it needs for this kind of store, is not installed.
    """
    try:
        import fsspec
    except ImportError:
        raise UserError(
            f"{url}: object stores need fsspec: pip install 'fastvim-jax[cells]'."
        ) from None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            with fsspec.open(url, "rb") as opened:
                return opened.read()
        except ImportError as error:
            raise UserError(f"{url}: {error}") from None
        except (FileNotFoundError, PermissionError) as error:
            raise DecodeError(f"{url}: {error or type(error).__name__}.") from None
        except Exception as error:  # Each store has errors of its own.
            last = error
    raise DecodeError(f"{url}: no answer in {ATTEMPTS} attempts ({last or type(last).__name__}).")

"""Read and write safetensors files. This is the only place of the library that opens one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastvim_jax.errors import UserError
from fastvim_jax.whole_file import whole_file


def read_safetensors(path: Path | str) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file by name, bfloat16 as `ml_dtypes.bfloat16`.

    The safetensors package checks the header before it makes an array: offsets must cover the file without gaps and
    agree with shapes and dtypes. So a truncated file and a wrong header are refused.

    Raises:
        UserError: the file is missing, is no regular file, is damaged, or holds a dtype that NumPy has no name for.
    """
    # Imported here, so that programs that read no such file do not wait for it.
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    if not path.is_file():  # Opening a named pipe would wait for a writer forever.
        raise UserError(f"there is no file {path}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no safetensors file, or it is damaged ({error}): copy or download it again."
        ) from error


def write_safetensors(arrays: Mapping[str, np.ndarray], path: Path, **metadata: str) -> None:
    """Write arrays by name to a file with the usual permissions. The safetensors package would make it private.

    A file that is there already is replaced once all is written.

    Raises:
        UserError: the file cannot be written; nothing is left of it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    mask = os.umask(0)
    os.umask(mask)
    with whole_file(path, SafetensorError) as partial:
        save_file(dict(arrays), partial, metadata=metadata)
        with contextlib.suppress(OSError):  # Some network file systems keep no permissions.
            partial.chmod(0o666 & ~mask)

"""Turn on JAX's persistent compilation cache for the commands."""

from __future__ import annotations

import os
from pathlib import Path


def keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.

    The folder is handed over in an environment variable, so that a command that needs no JAX does not import it.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # The home is read-only: commands work without a cache.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def cache_folder() -> Path:
    """Return the default folder: $XDG_CACHE_HOME/fastvim-jax/xla, or ~/.cache/fastvim-jax/xla."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastvim-jax" / "xla"

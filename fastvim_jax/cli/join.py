"""Join the other processes of a command, if there are any."""

from __future__ import annotations

import sys
from pathlib import Path

from fastvim_jax.closed_output import say


def join_processes(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the group of processes that the arguments, the environment or a launcher describe, and watch over it.

    Raises:
        UserError: see `distributed.initialize_distributed`.
    """
    from fastvim_jax.distributed import initialize_distributed, start_watch

    launch = initialize_distributed(coordinator, processes, process)
    start_watch(launch)
    if launch is not None:
        _share_compilation_cache()


def _share_compilation_cache() -> None:
    """Turn off JAX's persistent compilation cache on GPUs, unless all processes use the same folder.

    Processes that compile a program for several GPUs each time a part of its kernels, and wait up to 24 hours for the
    results of the others. One that finds the program in a cache of its own times none. Only the first process writes
    to the cache, so the second start on hosts with folders of their own would stand still.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    from fastvim_jax.distributed import is_first_process, share_folder

    enabled = jax.config.jax_enable_compilation_cache
    folder: str = (enabled and jax.config.jax_compilation_cache_dir) or ""
    remote = "://" in folder  # a storage service, which hosts share
    if jax.default_backend() != "gpu":
        return
    local = Path(folder) if folder and not remote else None
    if share_folder(local, sure=remote):
        return
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # Otherwise JAX keeps to what it decided at the first compilation.
    if folder and is_first_process():
        say(
            f"fastvim: not all processes share the compilation cache {folder}, so this run compiles everything anew. "
            "Let JAX_COMPILATION_CACHE_DIR name a folder that all hosts share.",
            sys.stderr,
        )

"""Run a program on equal shares of a batch at the same time, one for each core of a CPU.

XLA's CPU backend splits large products and passes over large arrays among cores. All else in a program runs on one
core after the other: on two cores, FastVim-T keeps 1.6 busy. Two programs at the same time keep both busy.
docs/performance.md has the times.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvim_jax.layers.cores import local_cores, one_core


def share_count(batch: int) -> int:
    """Return into how many equal shares to split a batch: at most one for each core of this machine's CPU device.

    It is 1 where programs are for other devices, or for several CPU devices, which share out a batch themselves.
    """
    return max(n for n in range(1, max(1, min(batch, local_cores())) + 1) if batch % n == 0)


def share_of(images: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return the shape of one share of a batch of images: that of the batch where it is one share."""
    size = images.shape[0] // share_count(images.shape[0])
    return images.update(shape=(size, *images.shape[1:]))


def tracing_share_of(batch: int) -> contextlib.AbstractContextManager[None]:
    """Trace the program for a share of a batch in this context, because a share runs on one core beside others."""
    return one_core() if share_count(batch) > 1 else contextlib.nullcontext()


def run_in_shares(program: Callable[[Any, Any], Any], weights: Any, images: Any, size: int) -> Any:
    """Compute `program(weights, images)`: if there are more than `size` images, each share in a thread; wait for all.

    Threads are needed, because JAX runs the programs that one thread starts on a CPU device one after the other.

    Args:
        program: a jitted function or a compiled one, traced in `tracing_share_of`. It computes each image apart from
            the others, and returns a pytree of arrays with a leading axis of images.
        weights: its first argument.
        images: its second argument, an array with a leading axis of images.
        size: images per share, as in `share_of`; it divides the number of images.
    """
    count = len(images) // size
    if count <= 1:
        return program(weights, images)
    # Views of the CPU device's memory: every slice of a JAX array would be copied by a program of its own.
    shares = np.split(np.asarray(images), count)

    def run(share: np.ndarray) -> Any:
        with one_core():
            return jax.block_until_ready(program(weights, share))

    parts = list(_threads(count).map(run, shares))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="share")

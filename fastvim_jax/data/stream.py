"""Read a grain sequence of batches ahead of its consumer, whatever task the batches are for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import re
import shutil
import signal
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from fastvim_jax.data.batches import Stream
from fastvim_jax.data.listing import FiledSequence
from fastvim_jax.data.workers import guard_worker, signals_blocked
from fastvim_jax.errors import UserError

_AHEAD = 2  # finished batches that wait in each worker
_SMALL = 2**16
"""Bytes of an array from which on it is handed over in shared memory. A pipe takes less time for a smaller one."""


class WorkersEnded(UserError):
    """A worker process that makes batches has ended, or was killed, before it was done."""


def grain_stream(batches: grain.MapDataset, workers: int, *, batch_bytes: int = 0) -> Stream:
    """Return a function that iterates over `batches` from a given number on, reading ahead.

    Arrays made by workers lie in memory that is freed when the next batch is taken (`batches.owned`).

    Args:
        batches: a random-access sequence of batches, dictionaries of arrays.
        workers: number of worker processes that read ahead; 0 for two threads of this process.
        batch_bytes: size of a batch, to check that shared memory is large enough; 0 if it is not known.

    Raises:
        UserError: shared memory is too small for the workers' batches.
    """
    ahead, claim = _room_for_batches(workers, batch_bytes)

    def stream(first: int) -> Generator[dict[str, Any], None, None]:
        _not_started.discard(
            claim
        )  # from now on its batches lie in shared memory, where all can see them
        running = _read_ahead(batches[first:], workers, ahead)
        try:
            # The first batch starts the workers, and the threads that do so.
            with signals_blocked() if workers else contextlib.nullcontext():
                batch = next(running, None)
            while batch is not None:
                yield dict(batch)
                batch = next(running, None)
        except RuntimeError as error:
            found = _ENDED.search(str(error))
            if found is None:
                raise
            raise WorkersEnded(
                f"a data worker ended with exit code {found[1]}{_why(int(found[1]))}. Use fewer data.workers or "
                "smaller batches if memory is short."
            ) from error
        finally:
            close = getattr(running, "close", None)
            if close is not None:
                close()
            del running, close
            if workers:
                # The workers' semaphores lie in cycles. Freed by chance while other ones are made, they leak, and
                # Python 3.12 warns of each.
                gc.collect()

    return stream


def evaluation_stream(
    batches: grain.MapDataset, workers: int, *, batch_bytes: int = 0
) -> tuple[Stream, bool]:
    """Return a stream over `batches`, and whether it is endless: whether it begins again after each pass.

    With workers it is endless, so that the workers stay for the next evaluation: starting processes takes seconds.
    For the arguments and errors see `grain_stream`.
    """
    endless = workers > 0
    passes = batches.repeat(None) if endless else batches
    return grain_stream(passes, workers, batch_bytes=batch_bytes), endless


# grain's words for a worker process that is gone.
_ENDED = re.compile(r"terminated unexpectedly with exit code (-?\d+)")


def _why(code: int) -> str:
    """Explain the exit code of a process that a signal ended."""
    if code >= 0:
        return ""
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return (
        f" ({name}, as the kernel sends when memory runs out)"
        if name == "SIGKILL"
        else f" ({name})"
    )


@dataclasses.dataclass(eq=False)
class _Claim:
    """Shared memory that a stream will take."""

    needed: int = 0


# Of the streams of this process, such as those of training and of evaluations.
_claims: weakref.WeakSet[_Claim] = weakref.WeakSet()
_not_started: weakref.WeakSet[_Claim] = weakref.WeakSet()
_SHARED = Path("/dev/shm")


def describe_shared_memory() -> str | None:
    """Say how much shared memory the workers of all streams of this process may hold; None if they hold none."""
    held = sum(claim.needed for claim in _claims)
    if not held:
        return None
    size = shutil.disk_usage(_SHARED).total
    return (
        f"Data workers hold up to {held / 2**20:,.0f} MiB of batches in {_SHARED}, "
        f"which has {size / 2**20:,.0f} MiB."
    )


def _room_for_batches(workers: int, batch_bytes: int) -> tuple[int, _Claim]:
    """Choose how many finished batches wait in each worker, 2 or 1, and claim the shared memory for them.

    A worker makes one more batch, and this process holds two. What other streams of this process claimed and have not
    taken yet, because they have not started, is not free. Streams of other processes are not known here.

    Raises:
        UserError: there is no room for even one batch per worker.
    """
    if not workers or not batch_bytes or not _SHARED.is_dir():
        return _AHEAD, _Claim()
    others = sum(claim.needed for claim in _not_started)
    free = shutil.disk_usage(_SHARED).free - others
    for ahead in range(_AHEAD, 0, -1):
        needed = (workers * (ahead + 1) + 2) * batch_bytes
        if needed <= free:
            claim = _Claim(needed)
            _claims.add(claim)
            _not_started.add(claim)
            return ahead, claim
    promised = f" beside the {others / 2**20:,.0f} MiB of this run's other streams" * bool(others)
    raise UserError(
        f"data.workers={workers} need {needed / 2**20:,.0f} MiB of shared memory for their batches, but /dev/shm has "
        f"{max(free, 0) / 2**20:,.0f} MiB free{promised}: use fewer workers or a smaller batch, or enlarge it (docker "
        "run --shm-size=16g, mount -o remount,size=16g /dev/shm)."
    )


def _read_ahead(
    batches: grain.MapDataset, workers: int, ahead: int
) -> Iterator[dict[str, np.ndarray]]:
    """Start reading ahead: in two threads of this process, or in worker processes."""
    if workers == 0:
        return iter(
            batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        )
    from absl import flags

    # grain's workers inherit absl's flags, and refuse to start if the flags were not parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    filed = grain.MapDataset.source(FiledSequence(batches))
    dataset = filed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    dataset = grain.experimental.WithOptionsIterDataset(
        dataset, grain.experimental.DatasetOptions(min_shm_size=_SMALL)
    )
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    guard = functools.partial(guard_worker, os.getpid())
    with signals_blocked():
        return iter(dataset.mp_prefetch(options, worker_init_fn=guard))

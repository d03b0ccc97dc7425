"""Run tasks on a source in several processes. Each one opens the source once and takes tasks until none are left."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from fastvim_jax.data.records import Source
from fastvim_jax.data.workers import guard_worker, signals_blocked

Task = TypeVar("Task")
Result = TypeVar("Result")

_source: Source | None = None


def map_source(
    work: Callable[[Source, Task], Result], source: Source, tasks: Sequence[Task], *, workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with `work(source, task)`, in the order in which they finish.

    Args:
        work: a function at the top level of a module.
        source: goes to each process once.
        tasks: what to work on.
        workers: processes; 0 or 1: this one.

    Raises:
        Exception: the first that `work` raises; tasks not begun are dropped.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task, work(source, task)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)),
        # Forking a process whose threads hold locks may hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(source, os.getpid()),
    )
    try:
        # Processes start as tasks come in.
        with signals_blocked():
            waiting = {pool.submit(_work, work, task): task for task in tasks}
        for done in concurrent.futures.as_completed(waiting):
            yield waiting.pop(done), done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(source: Source, parent: int) -> None:
    global _source
    _source = source
    guard_worker(parent)


def _work(work: Callable[[Source, Any], Any], task: Any) -> Any:
    assert _source is not None
    return work(_source, task)

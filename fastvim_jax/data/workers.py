"""Make worker processes end with their parent, however it ends, and ignore signals that the parent must answer.

A signal to a whole process group (Ctrl-C, a scheduler, a closed terminal) is answered by the parent alone: it finishes
the step, saves and ends its workers. So workers inherit a mask that blocks these signals, and a thread in each worker
takes them off the queue. Only a SIGTERM from the parent itself ends a worker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

from fastvim_jax.stop_signals import STOP_SIGNALS

SIGNALS = frozenset(STOP_SIGNALS)
_LOOK_EVERY = 0.5  # seconds


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the signals that ask a run to stop in this thread, and so in the processes and threads that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # Start the tracker now. Otherwise Python starts it with the first worker and unblocks two of the signals.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard_worker(parent: int, *_: int) -> None:
    """Prepare this process to be a worker of the process `parent`. Call it when the worker starts.

    When the parent ends, even if it is killed, the worker ends within a second. Then Python's resource tracker, which
    runs until the last of them has ended, frees their shared memory.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with, args=(parent,), name="parent watch", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):  # macOS
            time.sleep(_LOOK_EVERY)
            continue
        found = signal.sigtimedwait(SIGNALS, _LOOK_EVERY)
        if found is not None and found.si_signo == signal.SIGTERM and found.si_pid == parent:
            break
    os._exit(1)

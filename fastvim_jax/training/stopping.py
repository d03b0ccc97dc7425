"""Stopping a run when it is asked to: SIGTERM, as sent before a machine is taken away, or SIGINT (Ctrl-C).

The current step is finished, its state saved, and the run ends with exit status 75 (EX_TEMPFAIL: try again).
A second SIGINT stops at once and saves nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

STOPPED_STATUS = 75
"""Exit status of a run that was asked to stop, and saved: EX_TEMPFAIL of sysexits.h."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE = 0.5  # seconds
_ASK_EVERY = 4  # steps; only with several processes


class Stopped(Exception):
    """The run was asked to stop; everything up to `step` is saved.

    Attributes:
        step: updates made.
    """

    def __init__(self, reason: str, step: int, total_steps: int) -> None:
        super().__init__(
            f"{reason}: stopped after step {step} of {total_steps}, which is saved. "
            "The same command goes on from there."
        )
        self.step = step


class StopRequest:
    """Notes SIGTERM and SIGINT while it is entered; earlier handlers return afterwards.

    Outside the main thread, where Python lets nobody handle signals, only `ask` sets it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._earlier: dict[int, Any] = {}
        self._answers: tuple[int, jax.Array] | None = None
        self._any: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {each: signal.signal(each, self._note) for each in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, handler in self._earlier.items():
            signal.signal(each, handler)
        self._earlier = {}

    def ask(self, reason: str) -> None:
        """Ask the run to stop, as a signal does."""
        self.reason = self.reason or reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    def next_of(self, batches: Iterator[T]) -> T | None:
        """The next batch; None if the signal reached the processes that make batches as well, and ended them."""
        try:
            return next(batches)
        except Exception:
            if jax.process_count() == 1:
                deadline = time.monotonic() + _GRACE
                while self.reason is None and time.monotonic() < deadline:
                    time.sleep(0.01)  # Our own signal may be the later one.
                if self.reason is not None:
                    return None
            raise

    def agreed(self, step: int) -> bool:
        """Whether the run stops after `step`: the same answer in every process, which all must call at every step.

        With several processes any one's request stops all. They exchange theirs every few steps, and read the
        answers of the exchange before the last, which are there by then, so that nobody waits.
        """
        if jax.process_count() == 1:
            return self.reason is not None
        if step % _ASK_EVERY:
            return False
        before, self._answers = self._answers, (step, self._exchange())
        if before is None:
            return False
        stop = bool(before[1].addressable_data(0))
        if stop:
            self.ask("another process was asked to stop")
        return stop

    def _exchange(self) -> jax.Array:
        """Whether any process has a request: a number on one device of each process."""
        if self._any is None:
            first: dict[int, Any] = {}
            for device in jax.devices():
                first.setdefault(device.process_index, device)
            mesh = Mesh(np.array([first[i] for i in sorted(first)]), ("process",))
            one_each = NamedSharding(mesh, PartitionSpec("process"))
            whole = NamedSharding(mesh, PartitionSpec())
            self._any = one_each, jax.jit(lambda asked: asked.max(), out_shardings=whole)
        one_each, any_of = self._any
        mine = np.array([self.reason is not None], np.int32)
        return any_of(jax.make_array_from_process_local_data(one_each, mine))

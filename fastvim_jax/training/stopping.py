"""Stop a run on the signals of `stop_signals`: SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1 and SIGUSR2.

The loop finishes the current step, saves its state, and the process ends with exit status 75 (EX_TEMPFAIL: try again).
A second SIGINT stops at once and saves nothing. A run whose data worker died is saved and ends with the same status.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastvim_jax.data.stream import WorkersEnded
from fastvim_jax.stop_signals import STOP_SIGNALS

T = TypeVar("T")

STOPPED_STATUS = 75
"""Exit status of a run that was asked to stop and saved its state: EX_TEMPFAIL of sysexits.h."""

_ASK_EVERY = 4  # steps; only with several processes


class Stopped(Exception):
    """The run was asked to stop. Everything up to `step` is saved.

    Attributes:
        step: number of updates made.
    """

    def __init__(self, reason: str, step: int, total_steps: int) -> None:
        super().__init__(
            f"{reason}: stopped after step {step} of {total_steps}, which is saved. "
            "The same command continues from there."
        )
        self.step = step


class StopRequest:
    """Context manager that notes the signals of `stop_signals`, and restores the earlier handlers on exit.

    Python handles signals in the main thread only. In any other thread, only `ask` can request a stop. A signal that
    the process ignores, such as SIGHUP under `nohup`, stays ignored.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._earlier: dict[int, Any] = {}
        self._answers: tuple[int, jax.Array] | None = None
        self._any: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {
                each: signal.signal(each, self._note)
                for each in STOP_SIGNALS
                if signal.getsignal(each) is not signal.SIG_IGN
            }
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
        """Return the next batch. If a data worker died, ask the run to stop and return None.

        Raises:
            WorkersEnded: a data worker died in a run of several processes. This process cannot stop and save alone,
                because the others would wait for it in the next step.
        """
        try:
            return next(batches)
        except WorkersEnded as error:
            if jax.process_count() > 1:
                raise
            self.ask(str(error))
            return None

    def before_start(self, total_steps: int, step: int = 0) -> None:
        """End the run before its first step if it was asked to stop during the start, because compiling takes minutes.

        Raises:
            Stopped: the run was asked to stop. Nothing is lost, because no step was made.
        """
        if jax.process_count() == 1 and self.reason is not None:
            raise Stopped(self.reason, step, total_steps)

    def agreed(self, step: int) -> bool:
        """Return whether the run stops after `step`. All processes must call this at every step; all get one answer.

        A request to any process stops all of them. Every `_ASK_EVERY` steps the processes exchange their requests. The
        call then reads the result of the previous exchange, so no process waits for another.
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
        """Reduce the requests of all processes to one number on one device of each process."""
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

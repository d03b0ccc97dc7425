"""Trace some steps for xprof or TensorBoard's profiler: `fastvim train ... --profile 10:13`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from fastvim_jax.errors import UserError


@dataclass(frozen=True)
class ProfileSteps:
    """Which steps to trace, counted from 1 at this start of the run, both included.

    Raises:
        UserError: on construction, for an empty range.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise UserError(
                f"cannot profile the steps {self.first} to {self.last}: steps count from 1, as in 10:13."
            )

    @staticmethod
    def parse(text: str) -> ProfileSteps:
        """Read `10:13` or `10`.

        Raises:
            UserError: for anything else.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
        if match is None:
            raise UserError(
                f"cannot read the steps to profile from {text!r}: write first:last, as in 10:13."
            )
        return ProfileSteps(int(match[1]), int(match[2] or match[1]))


class Profiler:
    """Traces the chosen steps into a folder; a context manager, so that a trace is also kept after an error.

    Args:
        steps: which; None: none.
        folder: where the trace goes.
        first_step: the number of this start's first step in the run.
    """

    def __init__(self, steps: ProfileSteps | None, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._range = range(0)
        if steps is not None:
            self._range = range(first_step - 1 + steps.first, first_step + steps.last)
        self._tracing = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def begin(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Wrap a step's work, from the wait for its data on; start the trace at the first step to be traced."""
        if self._range and step == self._range[0]:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, metrics: Any) -> Path | None:
        """End a step; return the folder of the trace if this was the last one traced."""
        if not self._tracing or step < self._range[-1]:
            return None
        jax.block_until_ready(metrics)  # What was begun belongs to the trace.
        self._stop()
        return self._folder

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

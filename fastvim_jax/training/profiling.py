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
    """First and last step to trace, counted from 1 at this start of the run.

    Raises:
        UserError: on construction, if the range is empty.
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
            UserError: the text has another form.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
        if match is None:
            raise UserError(
                f"cannot read the steps to profile from {text!r}: write first:last, as in 10:13."
            )
        return ProfileSteps(int(match[1]), int(match[2] or match[1]))


class Profiler:
    """Context manager that traces the chosen steps into a folder. A trace is kept even after an error.

    Args:
        steps: the steps to trace; None: none.
        folder: the folder for the trace.
        first_step: number in the run of the first step after this start.
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
        """Wrap a step's work, including the wait for its data. Start the trace at the first step to trace."""
        if self._range and step == self._range[0]:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, metrics: Any) -> Path | None:
        """End a step. Return the folder of the trace if this was the last step to trace."""
        if not self._tracing or step < self._range[-1]:
            return None
        jax.block_until_ready(
            metrics
        )  # The trace must contain the work that this step has started.
        self._stop()
        return self._folder

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

"""Measure where a run's time goes and how well it uses the device: the timing numbers of the log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

TIMING = frozenset(
    {
        "seconds",
        "images_per_second",
        "step_seconds",
        "mfu",
        "data_wait",
        "dispatch",
        "device_wait",
        "first_step_seconds",
        "compile_seconds",
        "evaluation_seconds",
        "checkpoint_seconds",
        "step_images_per_second",
        "data_images_per_second",
    }
)
"""Names of all numbers that `Clock.lap` and `feed.FeedMeter.lap` give, and that differ from run to run."""

_WITHIN = ("data_wait", "dispatch", "device_wait")
_BETWEEN = ("evaluation_seconds", "checkpoint_seconds", "first_step_seconds", "compile_seconds")


class Clock:
    """Clock of the training loop. A lap lasts from one line of the log to the next.

    Args:
        batch_size: images per step, over all devices.
        image_flops: floating-point operations of a step per image, forward and backward.
        peak_flops: those a second that all devices could do at most; None: not known, and there is no `mfu`.
    """

    def __init__(
        self, batch_size: int, *, image_flops: float = 0.0, peak_flops: float | None = None
    ) -> None:
        self.batch_size = batch_size
        self._image_flops = image_flops
        self._peak = peak_flops
        self._begin = self._lap = time.perf_counter()
        self._steps = 0
        self._spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time inside as `part`: one of `TIMING`, outside the steps if its name ends in `_seconds`."""
        begin = time.perf_counter()
        yield
        self._spent[part] += time.perf_counter() - begin

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    def first_step(self) -> None:
        """Leave the time since the start, compilation included, out of the throughput."""
        self._restart(self._begin)
        self._spent["first_step_seconds"] = time.perf_counter() - self._begin

    def lap(self) -> dict[str, float]:
        """Return the lap's numbers and begin a new lap.

        `seconds` since the start; `images_per_second`, `step_seconds` and `mfu` of the steps alone; as shares of the
        steps' time, 0 to 1: `data_wait` for the next batch, `dispatch` of the step, `device_wait` for the device to
        come within a few steps; seconds of the lap in `evaluation_seconds` and `checkpoint_seconds` (the part of a
        save that holds up the loop); `first_step_seconds` once; `compile_seconds` of programs compiled after it.
        """
        now = time.perf_counter()
        between = sum(self._spent[part] for part in _BETWEEN)
        numbers = {"seconds": now - self._begin}
        length = now - self._lap - between
        if self._steps and length > 0:
            rate = self._steps * self.batch_size / length
            numbers |= {"images_per_second": rate, "step_seconds": length / self._steps}
            numbers |= {part: min(1.0, self._spent[part] / length) for part in _WITHIN}
            if self._peak:
                numbers["mfu"] = rate * self._image_flops / self._peak
        numbers |= {part: self._spent[part] for part in _BETWEEN if self._spent[part]}
        self._restart(now)
        return numbers

    def _restart(self, now: float) -> None:
        self._lap, self._steps = now, 0
        self._spent.clear()

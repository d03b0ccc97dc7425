"""Compare the speed of the data pipeline with that of the step, and say what to change if the step waits for data."""

from __future__ import annotations

from typing import Any

import jax

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.device_crops import PLANNERS, crops_on_device
from fastvim_jax.own_cores import own_cores

PROBED = range(3, 8)
"""Steps since the start whose time is taken alone, without reading ahead; the first two compile and warm up."""
_LATE = 0.05  # share of the time; less is not worth a change
_SAID_AT = 2  # the first line of the log counts batches that workers had read before


class FeedMeter:
    """Compare the rate of the step alone with that of the data pipeline.

    Args:
        batch_size: images per step, over all processes.
        data: the data's config, on which the advice depends; None for tasks without one.
    """

    def __init__(self, batch_size: int, data: Any = None) -> None:
        self._batch_size = batch_size
        self._data = data
        self._steps: list[float] = []
        self._laps = 0
        self._said = False

    def add_step(self, seconds: float) -> None:
        """Add the time of one probed step."""
        self._steps.append(seconds)

    def lap(self, seconds_per_batch: float | None) -> dict[str, float]:
        """Return the numbers for a line of the log.

        `step_images_per_second`, of the probed steps, and `data_images_per_second`: what the pipeline gave while it was
        not held up by the step.
        """
        self._laps += 1
        numbers = {}
        if self._steps:
            numbers["step_images_per_second"] = self._batch_size / min(self._steps)
        if seconds_per_batch:
            numbers["data_images_per_second"] = self._batch_size / seconds_per_batch
        return numbers

    def message(self, numbers: dict[str, float]) -> str | None:
        """Return what to tell the user, once: at the log's second line, or at the first later one with all numbers."""
        names = ("step_images_per_second", "data_images_per_second", "data_wait")
        if self._said or self._laps < _SAID_AT or not all(name in numbers for name in names):
            return None
        self._said = True
        step, data, wait = (numbers[name] for name in names)
        # The run was faster where the probed steps compiled, or saw more channels than others.
        step = max(step, numbers.get("images_per_second", 0.0))
        found = f"The step takes up to {step:,.0f} images/s, the data pipeline gives "
        if wait < _LATE or data >= step:
            return f"{found}at least {min(data, step):,.0f}: it keeps up."
        return f"{found}{data:,.0f}: the step waits for data {wait:.0%} of the time. {advice(self._data)}"


def advice(data: Any) -> str:
    """Say what would make the pipeline of a data config faster."""
    options = []
    workers = getattr(data, "workers", None)
    photographs = isinstance(data, ClassificationData) and not data.resident
    useful, why = own_cores(), "one a core"
    if photographs and crops_on_device(data):
        useful, why = min(useful, PLANNERS * jax.local_device_count()), "four a GPU at most"
    if workers is not None and workers < useful:
        options.append(f"data.workers={useful}, {why}")
    if photographs:
        if (data.rand_augment or data.colour_jitter) and data.augment_on == "host":
            options.append("data.augment_on=device")
        if data.source not in ("pixels", "digits"):
            options.append(
                "shards of pixels (fastvim data prepare --pixels 256, data.source=pixels)"
            )
    if isinstance(data, CellsData) and data.source in ("jump_cp", "channel_files"):
        options.append("shards (fastvim data prepare, data.source=array_record)")
    if options:
        return f"What helps: {'; '.join(options)}."
    return f"More cores{', or a resident set (data.resident),' if photographs else ''} would help."

"""Draw `summary.png` of a run folder: the curves so far, drawn anew after evaluations and at the end."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.analysis.summary_plot import plot_summary
from fastvim_jax.distributed import is_first_process
from fastvim_jax.training.metrics import read_metrics

SUMMARY_FILE = "summary.png"
INTERVAL = 60.0  # seconds; a picture takes about one of them

_log = logging.getLogger(__name__)


class SummaryPicture:
    """Picture of a run, drawn from its log.

    Args:
        folder: the run folder.
        total_steps: the run's length, for the title.
        headline: the score to draw.
        evaluator: the kind of the records that hold this score.
    """

    def __init__(
        self, folder: Path, total_steps: int, headline: Headline, evaluator: str = "eval"
    ) -> None:
        self._folder = folder
        self._headline = headline
        self._evaluator = evaluator
        self._total_steps = total_steps
        self._next = time.monotonic() + INTERVAL

    def draw(self, *, at_once: bool = False) -> None:
        """Draw it, unless that was done within the last minute. A picture that fails is no reason to stop a run."""
        if not is_first_process() or (time.monotonic() < self._next and not at_once):
            return
        self._next = time.monotonic() + INTERVAL
        file = self._folder / SUMMARY_FILE
        temporary = file.with_name(f"{file.stem}.tmp.png")
        records = read_metrics(self._folder)
        evaluations = [record for record in records if record["kind"] == self._evaluator]
        title = f"{self._folder.resolve().name}, {self._total_steps} steps"
        if evaluations:
            step, scores = evaluations[-1]["step"], self._headline.in_words(evaluations[-1])
            title += f"; at step {step}: {scores}"
        try:
            plot_summary(records, temporary, title=title, headline=self._headline)
            os.replace(temporary, file)
        except OSError as error:
            _log.warning("%s could not be written: %s", file, error)

"""Define a run's headline: the score that sums it up in the log, the picture and the command line's last line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WEIGHTS = ("raw", "ema")
"""The sets of weights that are evaluated, as scores name them: the trained ones and their average."""


@dataclass(frozen=True)
class Headline:
    """Which of an evaluation's scores stands for the run, and how to write and draw it.

    Attributes:
        score: its name: an evaluation records it as `raw_SCORE` and, of the averaged weights, `ema_SCORE`.
        label: its name in text and on the axis, e.g. "top-1".
        title: heading of its panel in the picture.
        percent: whether it is a share from 0 to 1, shown as a percentage.
        higher_is_better: whether larger values are better.
        loss: name of the loss on the picture's axis.
    """

    score: str
    label: str
    title: str
    percent: bool = True
    higher_is_better: bool = True
    loss: str = "loss"

    def in_words(self, scores: Mapping[str, Any]) -> str:
        """Write an evaluation's scores as a line for people; empty if the score is not among them."""
        parts = []
        for weights in WEIGHTS:
            if f"{weights}_{self.score}" not in scores:
                continue
            part = f"{weights} {self.label} {self._value(scores[f'{weights}_{self.score}'])}"
            if self.score != "loss" and f"{weights}_loss" in scores:
                part += f", loss {scores[f'{weights}_loss']:.4f}"
            parts.append(part)
        count = f" on {scores['count']} images" if parts and "count" in scores else ""
        return "; ".join(parts) + count

    def _value(self, value: float) -> str:
        if not self.percent:
            return f"{value:.4f}"
        # A COCO score of -1 says that there is nothing to count, such as images without objects.
        return "unknown (nothing to count)" if value < 0 else f"{100 * value:.2f} %"

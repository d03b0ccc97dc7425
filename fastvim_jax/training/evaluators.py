"""Define evaluators: a run has any number of them, and each evaluates it at its own interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastvim_jax.training.steps import TrainState


class Evaluation(NamedTuple):
    """The result of one evaluation.

    Attributes:
        scores: JSON-able numbers by name, the same in all processes. Scores of the raw weights begin with `raw_`,
            of their average with `ema_`.
        picture: an image file that was drawn, or None.
    """

    scores: Mapping[str, Any]
    picture: Path | None = None


@dataclass(frozen=True)
class Evaluator:
    """One way to judge a run.

    Attributes:
        name: kind of its records in the log, e.g. "eval"; no two evaluators of a run share one.
        run: `run(state, step)` evaluates a train state. All processes call it; the first one alone writes files.
        every_epochs: epochs between evaluations; 0: only after the last step, after which every evaluator runs.
        batches: batches or images that all processes go through together, which must be as many in all of them.
    """

    name: str
    run: Callable[[TrainState, int], Evaluation]
    every_epochs: int = 1
    batches: int | None = None

    def due(self, step: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Tell whether the evaluator runs after `step`."""
        epoch, rest = divmod(step, steps_per_epoch)
        epoch_is_due = rest == 0 and self.every_epochs > 0 and epoch % self.every_epochs == 0
        return epoch_is_due or step == total_steps

"""Report on a run: classify its held-out images, and draw one picture of the results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from fastvim_jax.analysis.plots import Sample, plot_run
from fastvim_jax.data import make_eval_iterator
from fastvim_jax.inference.predict import predict_batches
from fastvim_jax.training.classification.evaluation import HEADLINE
from fastvim_jax.training.metrics import read_metrics
from fastvim_jax.training.run_folder import Run

_SHOWN = 24


@dataclasses.dataclass(frozen=True)
class Report:
    """Held-out images classified.

    Attributes:
        count: how many there are.
        correct: how many are right.
    """

    count: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share that is right, from 0 to 1."""
        return self.correct / self.count


def report_run(run: Run, run_dir: Path | str, picture: Path | str) -> Report:
    """Classify a run's held-out images, and draw its curves, some predictions and some mistakes.

    Args:
        run: the trained model, from `load_run`.
        run_dir: its folder, for the metrics.
        picture: the PNG to write; its folder is made.

    Raises:
        UserError: when the data cannot be found.
    """
    data = run.config.data
    batches = make_eval_iterator(data)
    probabilities, labels = predict_batches(run.model, batches)
    predicted = probabilities.argmax(axis=-1)
    order = np.random.default_rng(0).permutation(len(labels))
    wrong = order[predicted[order] != labels[order]]
    # Mistakes that are not among the images drawn at random come first: those are shown anyway.
    wrong = np.concatenate([wrong[~np.isin(wrong, order[:_SHOWN])], wrong])
    mistakes = list(dict.fromkeys(wrong.tolist()))
    wanted = {int(i) for i in (*order[:_SHOWN], *mistakes[:_SHOWN])}
    images = _images(run, wanted)

    def sample(index: int) -> Sample:
        return Sample(
            images[index],
            truth=run.class_names[labels[index]],
            prediction=run.class_names[predicted[index]],
            probability=float(probabilities[index].max()),
        )

    report = Report(len(labels), int((predicted == labels).sum()))
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    plot_run(
        read_metrics(run_dir),
        [sample(int(i)) for i in order[:_SHOWN]],
        [sample(i) for i in mistakes[:_SHOWN]],
        picture,
        headline=HEADLINE,
        title=f"{Path(run_dir).resolve().name}: {report.correct} of {report.count} held-out images right "
        f"({report.accuracy:.1%}), step {run.step}, {run.weights} weights",
        mistakes_in_all=len(mistakes),
    )
    return report


def _images(run: Run, wanted: set[int]) -> dict[int, np.ndarray]:
    """Return the wanted images as they are cropped for the model, by their number among the valid ones."""
    found: dict[int, np.ndarray] = {}
    seen = 0
    for batch in make_eval_iterator(run.config.data):
        for image in batch["image"][batch["valid"]]:
            if seen in wanted:
                found[seen] = image
            seen += 1
    return found

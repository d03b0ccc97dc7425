"""Choose among a run's checkpoints and weights by the scores in its log."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvim_jax.analysis.headline import WEIGHTS, Headline
from fastvim_jax.training.config import RunConfig
from fastvim_jax.training.metrics import read_metrics
from fastvim_jax.training.tasks import folder_of


def headline_of(config: RunConfig) -> Headline | None:
    """Return the score that runs of this task are known by; None if the task names none."""
    folder = folder_of(config)
    if importlib.util.find_spec(f"{folder}.evaluation") is None:
        return None
    module = importlib.import_module(f"{folder}.evaluation")
    return getattr(module, "HEADLINE", None)


def better_weights(run_dir: Path | str, config: RunConfig, step: int) -> str:
    """Return `ema`, or `raw` if the run kept no average or its log says that the raw weights score better.

    In the first 1 / (1 - decay) steps or so, the average lags behind and is worse than the raw weights.
    """
    if config.ema_decay is None:
        return "raw"
    headline = headline_of(config)
    records = [r for r in read_metrics(run_dir, "eval") if r["step"] == step]
    if headline is None or not records:
        return "ema"
    scores = {w: _value(records[-1], w, headline) for w in WEIGHTS}
    return "raw" if scores["raw"] > scores["ema"] else "ema"


def best_step(run_dir: Path | str, config: RunConfig, steps: Sequence[int]) -> int | None:
    """Return the step out of `steps` with the best score, of the raw weights or of their average.

    Of equal scores, the latest step is returned. None: no step was evaluated.
    """
    headline = headline_of(config)
    if headline is None:
        return None
    found = {
        record["step"]: max(_value(record, weights, headline) for weights in WEIGHTS)
        for record in read_metrics(run_dir, "eval")
        if record["step"] in steps
    }
    scored = {step: value for step, value in found.items() if value > -math.inf}
    return max(scored, key=lambda step: (scored[step], step), default=None)


def _value(record: Mapping[str, Any], weights: str, headline: Headline) -> float:
    """Return a score whose sign makes larger better, or minus infinity if there is no score."""
    value = record.get(f"{weights}_{headline.score}")
    if not isinstance(value, int | float) or not math.isfinite(value):
        return -math.inf
    return float(value) if headline.higher_is_better else -float(value)

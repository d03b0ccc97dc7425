"""`fastvim eval RUN`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.usage import as_usage_error, parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to evaluate on what."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    weights: Literal["all", "raw", "ema"] = "all"
    """The trained weights, their average, or all that the run kept."""
    step: int | None = None
    """Which checkpoint; by default the last."""
    split: str | None = None
    """Which split of the data; by default the one the run was evaluated on."""
    path: str | None = None
    """Where the data lie now, if not where the run found them."""
    batch_size: int | None = None
    """Images at a time; never changes the result's count."""
    workers: int | None = None
    """Worker processes that decode images."""
    json: bool = False
    """Print JSON."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate a trained run: top-1, top-5 and loss, every image counted once."""
    chosen = parse(Arguments, "eval", arguments, f"{run.__doc__}")
    from fastvim_jax.data import make_eval_iterator
    from fastvim_jax.training import evaluate, load_run

    first = load_run(
        chosen.run, weights=None if chosen.weights == "all" else chosen.weights, step=chosen.step
    )
    runs = {first.weights: first}
    if chosen.weights == "all" and first.weights == "ema":
        runs = {"raw": load_run(chosen.run, weights="raw", step=first.step), "ema": first}
    given = {"path": chosen.path, "workers": chosen.workers}
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    with as_usage_error():
        data = dataclasses.replace(first.config.data, **changes)
    scores = {}
    for weights, loaded in runs.items():
        batches = make_eval_iterator(data, split=chosen.split, batch_size=chosen.batch_size)
        scores[weights] = evaluate(loaded.model, batches)
        batches.close()
    split = chosen.split or data.eval_split
    if chosen.json:
        summary = {"run": str(chosen.run), "step": first.step, "split": split, "scores": scores}
        print(json.dumps(summary, indent=2))
        return 0
    count = next(iter(scores.values()))["count"]
    print(f"{chosen.run} at step {first.step}, on the {count} images of {data.source} {split}:")
    print(f"{'weights':<8} {'top-1':>8} {'top-5':>8} {'loss':>8}")
    for weights, score in scores.items():
        print(f"{weights:<8} {score['top1']:>8.2%} {score['top5']:>8.2%} {score['loss']:>8.4f}")
    return 0

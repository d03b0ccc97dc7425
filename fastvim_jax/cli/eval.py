"""`fastvim eval RUN`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvim_jax.cli.usage import as_usage_error, parse
from fastvim_jax.errors import counted


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The run to evaluate, and the data."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder. Name it first: the fields of its data can then be overridden, such as --data.path."""
    weights: Literal["all", "raw", "ema"] = "all"
    """The trained weights, their average, or all that the run kept."""
    step: int | Literal["best"] | None = None
    """Which checkpoint: its step, or best for the one with the best score; by default the last."""
    split: str | None = None
    """Split of the data; by default the one that the run was evaluated on."""
    batch_size: int | None = None
    """Images per batch; by default the run's. The scores do not depend on it."""
    per_class: bool = False
    """Also show the accuracy on each class."""
    confusion: Path | None = None
    """Write the confusion matrix to this PNG file (averaged weights, if the run has them)."""
    json: bool = False
    """Print JSON."""


OTHER_TASKS = {
    "DetectionConfig": "fastvim_jax.cli.eval_detection",
    "SegmentationConfig": "fastvim_jax.cli.eval_segmentation",
}
"""The module that evaluates runs of a task with scores of its own, by the name of its config's class."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate a trained run: top-1, top-5 and loss, every image counted once."""
    if (other := OTHER_TASKS.get(_task(arguments))) is not None:
        status: int = importlib.import_module(other).run(arguments)
        return status
    from fastvim_jax.distributed import initialize_distributed, is_first_process
    from fastvim_jax.training.classification.run_scores import RunScores, score_run

    chosen = parse(_arguments(arguments), "eval", arguments, f"{run.__doc__}")
    initialize_distributed()
    given = {"eval_split": chosen.split, "eval_batch_size": chosen.batch_size}
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    with as_usage_error():
        data = dataclasses.replace(chosen.data or _data(chosen.run), **changes)
    found: RunScores = score_run(
        chosen.run,
        data,
        weights=chosen.weights,
        step=chosen.step,
        per_class=chosen.per_class or chosen.confusion is not None,
    )
    if not is_first_process():
        return 0
    best = "ema" if "ema" in found.scores else "raw"
    if found.other_names:
        number, ours, theirs = found.other_names
        print(
            f"fastvim: class {number} is {ours!r} in the run, but {theirs!r} in the data: "
            "the scores mean something only if these are the same.",
            file=sys.stderr,
        )
    if chosen.confusion is not None:
        from fastvim_jax.analysis.confusion import plot_confusion

        scores = found.scores[best]
        title = (
            f"{chosen.run.name}, {best} weights: {scores['top1']:.2%} of {scores['count']} right"
        )
        plot_confusion(scores["confusion"], found.class_names, chosen.confusion, title=title)
    if chosen.json:
        print(json.dumps(_summary(chosen, data.eval_split, found), indent=2, ensure_ascii=False))
    else:
        _print(chosen, f"{data.source} {data.eval_split}", found)
    return 0


def _task(arguments: Sequence[str]) -> str:
    """Return the class name of the config of the run that is named first; empty if none is."""
    from fastvim_jax.training.run_folder import CONFIG_FILE, read_config

    if not arguments or not (Path(arguments[0]) / CONFIG_FILE).is_file():
        return ""
    return type(read_config(arguments[0])).__name__


def _data(run_dir: Path) -> Any:
    from fastvim_jax.training.run_folder import read_config

    return read_config(run_dir).data


def _arguments(arguments: Sequence[str]) -> type:
    """Build the arguments. Those of the data default to the run's values where the run is named first."""
    from fastvim_jax.data import ClassificationData

    kind: Any = Annotated[ClassificationData | None, tyro.conf.Suppress]
    default: Any = None
    if arguments and not arguments[0].startswith("-") and Path(arguments[0]).is_dir():
        default = _data(Path(arguments[0]))
        kind = type(default)
    field = ("data", kind, dataclasses.field(default=default))
    return dataclasses.make_dataclass("Arguments", [field], bases=(Arguments,), frozen=True)


def _summary(chosen: Any, split: str, found: Any) -> dict[str, Any]:
    plain = ("count", "top1", "top5", "loss")
    scores: dict[str, Any] = {}
    for weights, score in found.scores.items():
        scores[weights] = {key: score[key] for key in plain}
        if chosen.per_class:
            scores[weights]["classes"] = found.by_class(weights)
    return {"run": str(chosen.run), "step": found.step, "split": split, "scores": scores}


def _print(chosen: Any, data: str, found: Any) -> None:
    count = next(iter(found.scores.values()))["count"]
    print(f"{chosen.run} at step {found.step}, on {counted(count, 'image')} of {data}:")
    print(f"{'weights':<8} {'top-1':>8} {'top-5':>8} {'loss':>8}")
    for weights, score in found.scores.items():
        print(f"{weights:<8} {score['top1']:>8.2%} {score['top5']:>8.2%} {score['loss']:>8.4f}")
    if chosen.per_class:
        tables = [found.by_class(weights) for weights in found.scores]
        width = max(5, *(len(row["class"]) for row in tables[0]))
        heads = " ".join(f"{weights:>8}" for weights in found.scores)
        print(f"\n{'class':<{width}} {'images':>7} {heads}   (top-1)")
        for rows in zip(*tables, strict=True):
            shares = " ".join(
                "       -" if r["top1"] is None else f"{r['top1']:>8.2%}" for r in rows
            )
            print(f"{rows[0]['class']:<{width}} {rows[0]['count']:>7} {shares}")
    if chosen.confusion is not None:
        print(f"\nWhich classes are taken for which: {chosen.confusion}")

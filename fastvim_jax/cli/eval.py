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

from fastvim_jax.cli.join import join_processes
from fastvim_jax.cli.usage import UsageError, as_usage_error, parse
from fastvim_jax.errors import UserError, counted


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The run to evaluate, and the data."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, a folder of `save_pretrained`, or hf://owner/name. Name it first: the fields of its data can then
    be set, such as --data.path. A saved model needs this one, because it keeps no data."""
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


_UNNAMED = "FOLDER"
"""Path of the data of a saved model until the command names another."""
OTHER_TASKS = {
    "DetectionConfig": "fastvim_jax.cli.eval_detection",
    "SegmentationConfig": "fastvim_jax.cli.eval_segmentation",
}
"""The module that evaluates runs of a task with scores of its own, by the name of its config's class."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate a trained run or a saved model: top-1, top-5 and loss, every image counted once."""
    if (other := OTHER_TASKS.get(_task(arguments))) is not None:
        status: int = importlib.import_module(other).run(arguments)
        return status
    from fastvim_jax.distributed import is_first_process
    from fastvim_jax.training.classification.run_scores import RunScores, score_run

    chosen = parse(_arguments(arguments), "eval", arguments, f"{run.__doc__}")
    join_processes()
    given = {"eval_split": chosen.split, "eval_batch_size": chosen.batch_size}
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    with as_usage_error():
        data = dataclasses.replace(chosen.data or _data(chosen.run), **changes)
    if data.path == _UNNAMED and data.source != "digits":
        raise UsageError(
            f"{chosen.run} is a saved model, which keeps no data: name them by --data.path FOLDER, and by "
            "--data.source and --split if they are no class folders with a split val."
        )
    found: RunScores = score_run(
        chosen.run,
        data,
        weights=chosen.weights,
        step=chosen.step,
        per_class=chosen.per_class or chosen.confusion is not None,
    )
    if not is_first_process():
        return 0
    best = "ema" if "ema" in found.scores else next(iter(found.scores))
    if found.other_names:
        number, ours, theirs = found.other_names
        print(
            f"fastvim: class {number} is {ours!r} in the model, but {theirs!r} in the data: "
            "the scores mean something only if these are the same.",
            file=sys.stderr,
        )
    if chosen.confusion is not None:
        from fastvim_jax.analysis.confusion import plot_confusion

        scores = found.scores[best]
        title = f"{Path(chosen.run).name}, {best} weights: {scores['top1']:.2%} of {scores['count']} right"
        plot_confusion(scores["confusion"], found.class_names, chosen.confusion, title=title)
    if chosen.json:
        print(json.dumps(_summary(chosen, data.eval_split, found), indent=2, ensure_ascii=False))
    else:
        _print(chosen, f"{data.source} {data.eval_split}", found)
    return 0


def _task(arguments: Sequence[str]) -> str:
    """Return the class name of the config of the run that is named first; empty if none is."""
    from fastvim_jax.models.pretrained import is_pretrained
    from fastvim_jax.training.run_folder import CONFIG_FILE, read_config

    if not arguments or not (Path(arguments[0]) / CONFIG_FILE).is_file():
        return ""
    if is_pretrained(arguments[0]):
        return ""
    return type(read_config(arguments[0])).__name__


def _data(source: str) -> Any:
    """Return the data config of a run; for a saved model one with its preprocessing and the path `_UNNAMED`.

    Raises:
        UserError: no such run or saved model, or one that is no classifier of photographs.
    """
    from fastvim_jax.inference.preprocessing import photographs_data
    from fastvim_jax.models.config import VisionMambaConfig, ViTConfig
    from fastvim_jax.models.pretrained import is_pretrained, read_model_config, read_preprocessing
    from fastvim_jax.training.run_folder import read_config

    if not is_pretrained(source):
        return read_config(source).data
    config = read_model_config(source)
    # Models of cell images are subclasses, and evaluated on data of their own.
    if type(config) not in (VisionMambaConfig, ViTConfig) or not config.num_classes:
        kind = type(config).__name__.removesuffix("Config")
        raise UserError(
            f"{source} holds a {kind}: of saved models, only classifiers of photographs are evaluated. Name the "
            "folder of a run."
        )
    data = photographs_data(read_preprocessing(source), config.channels)
    return dataclasses.replace(data, source="image_folder", path=_UNNAMED, eval_split="val")


def _arguments(arguments: Sequence[str]) -> type:
    """Build the arguments. Those of the data default to the run's values where the run is named first."""
    from fastvim_jax.data import ClassificationData
    from fastvim_jax.models.pretrained import is_pretrained

    kind: Any = Annotated[ClassificationData | None, tyro.conf.Suppress]
    default: Any = None
    first = arguments[0] if arguments else "-"
    if not first.startswith("-") and (Path(first).is_dir() or is_pretrained(first)):
        default = _data(first)
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
    step = "" if found.step is None else f" at step {found.step}"
    print(f"{chosen.run}{step}, on {counted(count, 'image')} of {data}:")
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

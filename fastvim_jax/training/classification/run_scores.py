"""Score a trained run or a saved model on any data: all its weights in one pass, over all devices."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from fastvim_jax.data.labelled import LabelledData, make_eval_iterator, make_preprocess
from fastvim_jax.distributed import (
    connect,
    make_mesh,
    place_batch,
    place_whole,
    replicated,
    round_up,
)
from fastvim_jax.distributed.mesh import on_mesh
from fastvim_jax.errors import UserError, counted
from fastvim_jax.models.pretrained import is_pretrained, load_pretrained, refuse_choice
from fastvim_jax.training.channel_weights import require_places
from fastvim_jax.training.classification.config import TrainConfig
from fastvim_jax.training.classification.evaluation import (
    ClassificationScores,
    evaluate_weights,
    make_eval_step,
)
from fastvim_jax.training.course import require_same_course, require_same_weights
from fastvim_jax.training.run_folder import load_run, read_config


@dataclasses.dataclass(frozen=True)
class RunScores:
    """The result of `score_run`.

    Attributes:
        step: step of the checkpoint; None for a saved model.
        class_names: the run's class names; for a saved model without names those of the data.
        scores: scores of the weights `raw` and `ema`, or of those of a saved model, `saved`; see `evaluate`.
        other_names: the first class that has another name in the data, as (number, name in the run, name in the data);
            None if the names agree.
    """

    step: int | None
    class_names: tuple[str, ...]
    scores: dict[str, ClassificationScores]
    other_names: tuple[int, str, str] | None = None

    def by_class(self, weights: str) -> list[dict[str, Any]]:
        """List each class, in label order: its name, images, and share of right answers (None without images)."""
        found = self.scores[weights]
        right = found["confusion"].diagonal()
        return [
            {"class": name, "count": int(count), "top1": int(r) / int(count) if count else None}
            for name, count, r in zip(self.class_names, found["class_count"], right, strict=True)
        ]


def score_run(
    run_dir: Path | str,
    data: LabelledData,
    *,
    weights: Literal["all", "raw", "ema"] = "all",
    step: int | Literal["best"] | None = None,
    per_class: bool = False,
) -> RunScores:
    """Evaluate the weights of a run or a saved model on `data.eval_split`; every image is counted once.

    Args:
        run_dir: the run folder, a folder of `save_pretrained`, or `hf://owner/name`.
        data: what to evaluate on; the run's own config has the transforms it was trained for.
        weights: which weights to evaluate; `all` is the raw ones and, if the run kept it, their average.
        step: step of the checkpoint, or `best` for the one with the best score in the log; by default the latest.
        per_class: also count by class.

    Raises:
        UserError: no such run, checkpoint or data; data of another number of classes than the model's, or of the same
            classes or channels in another order; weights or a step of a saved model.
    """
    chosen = None if weights == "all" else weights
    load: Callable[[Any, tuple[str, ...]], _Loaded]
    if is_pretrained(run_dir):
        refuse_choice(run_dir, chosen, step)
        load = partial(_saved, run_dir, data)
    else:
        config = _classifier_config(run_dir)
        require_places(config.data, data)
        every = ["raw"] if config.ema_decay is None else ["raw", "ema"]
        load = partial(_checkpoint, run_dir, every if chosen is None else [chosen], step)
    mesh = make_mesh()
    place = replicated(mesh)
    batches = make_eval_iterator(
        data,
        batch_size=round_up(data.eval_batch_size or data.batch_size, mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
        names = batches.source.class_names
        require_same_course(
            {"data": data},
            names,
            batches=batches.steps_per_epoch,
            weights=weights,
            step=step,
            per_class=per_class,
        )
        connect(place)
        models, own, at = load(place, names)
        if len(names) != len(own):
            raise UserError(
                f"The data have {counted(len(names), 'class', 'classes')}, the model {len(own)}: choose data of the "
                "model's classes, or name them by data.class_list."
            )
        pairs = enumerate(zip(own, names, strict=True))
        other = next(((i, ours, theirs) for i, (ours, theirs) in pairs if ours != theirs), None)
        if other and sorted(own) == sorted(names):
            raise UserError(
                f"The data have the model's classes in another order: class {other[0]} is {other[1]!r} in the model, "
                f"but {other[2]!r} in the data. List the names in the model's order by data.class_list."
            )
        graphdef = nnx.graphdef(next(iter(models.values())))
        eval_step = on_mesh(
            mesh, make_eval_step(graphdef, preprocess=make_preprocess(data), per_class=per_class)
        )
        params = {name: nnx.state(model) for name, model in models.items()}
        scores = evaluate_weights(eval_step, params, map(partial(place_batch, mesh), batches))
    return RunScores(at, own, scores, other)


def _classifier_config(run_dir: Path | str) -> TrainConfig:
    config = read_config(run_dir)
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"{run_dir} is a run of a {type(config).__name__} and not of a classifier (TrainConfig): its scores are in "
            "metrics.jsonl; fine-tune it with --init to get a classifier."
        )
    return config


_Loaded = tuple[dict[str, nnx.Module], tuple[str, ...], int | None]
"""Models by the name of their weights, the class names, and the step."""


def _checkpoint(
    run_dir: Path | str, wanted: Sequence[str], step: Any, place: Any, names: tuple[str, ...]
) -> _Loaded:
    """Load the wanted weights of a run's checkpoint."""
    load = partial(load_run, run_dir, place=place, class_names=names)
    run = load(weights=wanted[0], step=step)
    runs = {run.weights: run} | {w: load(weights=w, step=run.step) for w in wanted[1:]}
    return {name: each.model for name, each in runs.items()}, run.class_names, run.step


def _saved(folder: Path | str, data: LabelledData, place: Any, names: tuple[str, ...]) -> _Loaded:
    """Load a saved model. If it does not name its classes, they are called as in the data."""
    found = load_pretrained(folder)
    require_places(found.preprocessing, data)
    require_same_weights(nnx.state(found.model))
    nnx.update(found.model, place_whole(nnx.state(found.model), place))
    classes: int = found.model.config.num_classes  # type: ignore[attr-defined]
    own = found.class_names or (names if len(names) == classes else ("",) * classes)
    return {"saved": found.model}, own, None

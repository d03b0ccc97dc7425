"""Score a trained run on any data: raw and averaged weights in one pass, over all devices."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from fastvim_jax.data.labelled import LabelledData, make_eval_iterator, make_preprocess
from fastvim_jax.distributed import make_mesh, place_batch, replicated, round_up
from fastvim_jax.distributed.mesh import on_mesh
from fastvim_jax.errors import UserError, counted
from fastvim_jax.training.classification.config import TrainConfig
from fastvim_jax.training.classification.evaluation import (
    ClassificationScores,
    evaluate_weights,
    make_eval_step,
)
from fastvim_jax.training.run_folder import load_run, read_config


@dataclasses.dataclass(frozen=True)
class RunScores:
    """The result of `score_run`.

    Attributes:
        step: step of the checkpoint.
        class_names: the run's class names.
        scores: scores of the weights `raw` and `ema`; see `evaluate`.
        other_names: the first class that has another name in the data, as (number, name in the run, name in the data);
            None if the names agree.
    """

    step: int
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
    """Evaluate a run's weights on `data.eval_split`; every image is counted once.

    Args:
        run_dir: the run folder.
        data: what to evaluate on; the run's own config has the transforms it was trained for.
        weights: which weights to evaluate; `all` is the raw ones and, if the run kept it, their average.
        step: step of the checkpoint, or `best` for the one with the best score in the log; by default the latest.
        per_class: also count by class.

    Raises:
        UserError: no such run, checkpoint or data; data of another number of classes than the model's.
    """
    config = read_config(run_dir)
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"{run_dir} is a run of a {type(config).__name__} and not of a classifier (TrainConfig): its scores are in "
            "metrics.jsonl; fine-tune it with --init to get a classifier."
        )
    mesh = make_mesh()
    place = replicated(mesh)
    wanted = [weights] if weights != "all" else ["raw", "ema"]
    if weights == "all" and config.ema_decay is None:
        wanted = ["raw"]
    batches = make_eval_iterator(
        data,
        batch_size=round_up(data.eval_batch_size or data.batch_size, mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
        names = batches.source.class_names
        load = partial(load_run, run_dir, place=place, class_names=names)
        run = load(weights=wanted[0], step=step)
        runs = {run.weights: run} | {w: load(weights=w, step=run.step) for w in wanted[1:]}
        if len(names) != len(run.class_names):
            raise UserError(
                f"The data have {counted(len(names), 'class', 'classes')}, the run {len(run.class_names)}: choose "
                "data of the run's "
                "classes, or name them by data.class_list."
            )
        graphdef = nnx.graphdef(run.model)
        eval_step = on_mesh(
            mesh, make_eval_step(graphdef, preprocess=make_preprocess(data), per_class=per_class)
        )
        params = {name: nnx.state(each.model) for name, each in runs.items()}
        scores = evaluate_weights(eval_step, params, map(partial(place_batch, mesh), batches))
    pairs = enumerate(zip(run.class_names, names, strict=True))
    other = next(((i, ours, theirs) for i, (ours, theirs) in pairs if ours != theirs), None)
    return RunScores(run.step, run.class_names, scores, other)

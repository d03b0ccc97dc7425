"""Exact evaluation: every image is counted once, whatever the batch size and the padding of the last batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from fastvim_jax.data import BatchIterator
from fastvim_jax.data.device_transforms import Preprocess, make_preprocess
from fastvim_jax.errors import UserError
from fastvim_jax.training.steps import Batch, Metrics, TrainState, make_eval_step

Scores = dict[str, Any]


def evaluate(model: nnx.Module, batches: Iterable[Batch], *, per_class: bool = False) -> Scores:
    """Evaluate a model over one pass.

    Args:
        model: a classifier, called on `image` `b h w c`.
        batches: batches of `image`, `label` and `valid`: of `make_eval_iterator`, whose pixels are normalised by
            its config, or with images that are normalised already.
        per_class: also count by class.

    Returns:
        `count` images, the shares `top1` and `top5` (0 to 1) among them, and their mean cross entropy `loss`. By
        class, int64: `class_count` images of each, and `confusion`, images of the class of the row taken for that
        of the column (but for those whose logits hold a NaN).

    Raises:
        UserError: when there is no image to count.
    """
    graphdef, params = nnx.split(model)
    eval_step = make_eval_step(graphdef, preprocess=preprocess_of(batches), per_class=per_class)
    return evaluate_weights(eval_step, {"it": params}, batches)["it"]


def preprocess_of(batches: Iterable[Batch]) -> Preprocess | None:
    """How the images of `batches` become the model's input; None: they are that already."""
    return make_preprocess(batches.config) if isinstance(batches, BatchIterator) else None


def evaluate_weights(
    eval_step: Any, weights: Mapping[str, Any], batches: Iterable[Batch]
) -> dict[str, Scores]:
    """Evaluate several sets of weights of one model in a single pass over the data; see `evaluate`.

    Args:
        eval_step: from `make_eval_step`.
        weights: parameters by name, e.g. `raw` and `ema`.
        batches: see `evaluate`.
    """
    totals: dict[str, Metrics] = {name: {} for name in weights}
    waiting: list[dict[str, Metrics]] = []
    for batch in batches:
        waiting.append({name: eval_step(params, batch) for name, params in weights.items()})
        if len(waiting) > 1:  # The batch before is fetched while this one computes.
            _add(totals, waiting.pop(0))
    for counts in waiting:
        _add(totals, counts)
    return {name: _shares(total) for name, total in totals.items()}


def evaluate_state(
    eval_step: Any, state: TrainState, batches: BatchIterator, place: Callable[[Any], Batch]
) -> dict[str, int | float]:
    """Scores of a train state's raw weights and, if kept, of their average: `count`, `raw_top1`, `ema_loss`, ...

    Args:
        eval_step: from `make_eval_step`.
        state: whose weights.
        batches: one pass, rewound afterwards.
        place: puts a batch on the devices.
    """
    weights = {"raw": state.params} | ({} if state.ema is None else {"ema": state.ema})
    scores = evaluate_weights(eval_step, weights, map(place, batches))
    batches.rewind()
    return {"count": scores["raw"]["count"]} | {
        f"{name}_{key}": score[key]
        for name, score in scores.items()
        for key in ("top1", "top5", "loss")
    }


def in_words(scores: Mapping[str, Any]) -> str:
    """The scores of `evaluate_state` as a line for people."""
    parts = [
        f"{name} top-1 {100 * scores[f'{name}_top1']:.2f} %, loss {scores[f'{name}_loss']:.4f}"
        for name in ("raw", "ema")
        if f"{name}_top1" in scores
    ]
    return f"{'; '.join(parts)} on {scores['count']} images"


def _add(totals: dict[str, Metrics], counts: dict[str, Metrics]) -> None:
    """Add one batch's counts on the host: whole numbers of any size, losses in float64."""
    for name, batch in jax.device_get(counts).items():
        for key, value in batch.items():
            value = value.astype(np.int64) if value.ndim else value.item()
            totals[name][key] = totals[name].get(key, 0) + value


def _shares(total: Metrics) -> Scores:
    if not total.get("count"):
        raise UserError("there is no valid image to evaluate: check data.eval_split and data.path.")
    count = total["count"]
    shares = {key: total[key] / count for key in ("top1", "top5", "loss")}
    by_class: Scores = {key: total[key] for key in ("class_count", "confusion") if key in total}
    return {"count": count, **shares, **by_class}

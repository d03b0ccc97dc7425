"""Exact evaluation: every image is counted once, whatever the batch size and the padding of the last batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from fastvim_jax.data import BatchIterator
from fastvim_jax.data.device_transforms import Preprocess, make_preprocess
from fastvim_jax.errors import UserError
from fastvim_jax.training.steps import Batch, Metrics, make_eval_step

Scores = dict[str, int | float]


def evaluate(model: nnx.Module, batches: Iterable[Batch]) -> Scores:
    """Evaluate a model over one pass.

    Args:
        model: a classifier, called on `image` `b h w c`.
        batches: batches of `image`, `label` and `valid`: of `make_eval_iterator`, whose pixels are normalised by
            its config, or with images that are normalised already.

    Returns:
        `count` images, the shares `top1` and `top5` (0 to 1) among them, and their mean cross entropy `loss`.

    Raises:
        UserError: when there is no image to count.
    """
    graphdef, params = nnx.split(model)
    eval_step = make_eval_step(graphdef, preprocess=preprocess_of(batches))
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


def _add(totals: dict[str, Metrics], counts: dict[str, Metrics]) -> None:
    """Add one batch's counts on the host: whole numbers of any size, losses in float64."""
    for name, batch in jax.device_get(counts).items():
        for key, value in batch.items():
            totals[name][key] = totals[name].get(key, 0) + value.item()


def _shares(total: Metrics) -> Scores:
    if not total.get("count"):
        raise UserError("there is no valid image to evaluate: check data.eval_split and data.path.")
    count = total["count"]
    return {"count": count} | {key: total[key] / count for key in ("top1", "top5", "loss")}

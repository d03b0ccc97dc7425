"""Evaluate classifiers exactly: every image counts once, whatever the batch size and the padding of the last batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.data import BatchIterator
from fastvim_jax.data.device_transforms import Preprocess
from fastvim_jax.data.labelled import make_preprocess
from fastvim_jax.data.prefetch import place_ahead
from fastvim_jax.distributed import on_every_device
from fastvim_jax.errors import UserError
from fastvim_jax.models.channels import channel_inputs
from fastvim_jax.training.corrupt import count_corrupt
from fastvim_jax.training.evaluators import Evaluation, Evaluator
from fastvim_jax.training.label_rank import label_rank
from fastvim_jax.training.steps import (
    Batch,
    Metrics,
    TrainState,
    gather_outside_blocks,
    require_normalised,
)

HEADLINE = Headline(
    "top1", label="top-1", title="Accuracy on held-out images", loss="cross entropy"
)
ClassificationScores = dict[str, Any]


def evaluate(
    model: nnx.Module, batches: Iterable[Batch], *, per_class: bool = False
) -> ClassificationScores:
    """Evaluate a model over one pass.

    Args:
        model: a classifier, called on `image` `b h w c`.
        batches: batches of `image`, `label` and `valid`. If they come from `make_eval_iterator`, their pixels are
            normalised as its config says; otherwise the images must be normalised already.
        per_class: also count by class.

    Returns:
        `count`: number of images; `top1`, `top5`: shares of right answers (0 to 1); `loss`: mean cross entropy. With
        `per_class` also, int64: `class_count` `classes`, the images of each class, and `confusion` `classes classes`,
        the images by true class (row) and predicted class (column), without images whose logits hold a NaN.

    Raises:
        UserError: there is no image to count, a label is none of the model's classes, or `valid` is not bool.
    """
    graphdef, params = nnx.split(model)
    eval_step = make_eval_step(graphdef, preprocess=preprocess_of(batches), per_class=per_class)
    return evaluate_weights(eval_step, {"model": params}, batches)["model"]


def preprocess_of(batches: Iterable[Batch]) -> Preprocess | None:
    """Return the function that normalises the images of `batches`, or None if they are normalised already."""
    return make_preprocess(batches.config) if isinstance(batches, BatchIterator) else None


def evaluate_weights(
    eval_step: Any, weights: Mapping[str, Any], batches: Iterable[Batch]
) -> dict[str, ClassificationScores]:
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
        if (
            len(waiting) > 1
        ):  # Fetch the counts of the previous batch while the device computes this one.
            _add(totals, waiting.pop(0))
    for counts in waiting:
        _add(totals, counts)
    return {name: _shares(total) for name, total in totals.items()}


def make_evaluator(
    eval_step: Any, batches: BatchIterator, place: Callable[[Any], Batch], *, every_epochs: int
) -> Evaluator:
    """Return an evaluator of a state's raw weights and, if kept, their average: `count`, `raw_top1`, `ema_loss`, ...

    Args:
        eval_step: from `make_eval_step`.
        batches: one pass over the data, rewound after each.
        place: puts a batch on the devices.
        every_epochs: epochs between evaluations; 0: only after the last step.
    """

    def run(state: TrainState, step: int) -> Evaluation:
        weights = {"raw": state.params} | ({} if state.ema is None else {"ema": state.ema})
        with contextlib.closing(place_ahead(batches, place)) as placed:
            found = evaluate_weights(eval_step, weights, placed)
        batches.rewind()
        scores: ClassificationScores = {"count": found["raw"]["count"]} | {
            f"{name}_{key}": score[key]
            for name, score in found.items()
            for key in ("top1", "top5", "loss")
        }
        if corrupt := count_corrupt(batches.corrupt, batches.config):
            scores["corrupt_records"] = corrupt
        return Evaluation(scores)

    return Evaluator("eval", run, every_epochs=every_epochs, batches=batches.steps_per_epoch)


def normalise_batch(batch: Batch, preprocess: Preprocess | None) -> jax.Array:
    """Return a batch's images as the model's input, each channel normalised by its own statistics."""
    if preprocess is None:
        return batch["image"]
    ids = {} if "channel_ids" not in batch else {"channel_ids": batch["channel_ids"]}
    return preprocess(batch["image"], **ids)


def make_eval_step(
    graphdef: nnx.GraphDef, *, preprocess: Preprocess | None = None, per_class: bool = False
) -> Callable[[Any, Batch], Metrics]:
    """Compile `step(params, batch) -> counts` of one evaluation batch.

    A batch holds

    - `image` `b h w c`: pixels (uint8) if there is a `preprocess`, otherwise normalised floats;
    - `label` `b`;
    - `valid` `b`: False for padding;
    - `channel_ids` `b k`, only if the images hold some of the model's channels only.

    The counts are sums over the valid images: `count`, `top1`, `top5` (int32), `loss` (cross entropy, float32 or
    wider) and `no_class` (int32), the images whose label is none of the model's classes. With `per_class` there are
    also `class_count` `classes` and `confusion` `classes classes` (int32; rows are labels, columns predictions; images
    whose logits hold a NaN are left out).
    """

    @jax.jit
    def step(params: Any, batch: Batch) -> Metrics:
        images = normalise_batch(batch, preprocess)
        model = nnx.merge(graphdef, gather_outside_blocks(params))
        logits = model(**channel_inputs(model, require_normalised(images), batch))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        label, valid = batch["label"], batch["valid"]
        if valid.dtype != bool or not jnp.issubdtype(label.dtype, jnp.integer):
            raise UserError(
                f"`valid` must be bool and `label` integers; got {valid.dtype} and {label.dtype}."
            )
        rank = label_rank(logits, label)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        counts = {
            "count": valid.sum(dtype=jnp.int32),
            "top1": (valid & (rank < 1)).sum(dtype=jnp.int32),
            "top5": (valid & (rank < 5)).sum(dtype=jnp.int32),
            "loss": jnp.where(valid, loss, 0.0).sum(),
            "no_class": (valid & ((label < 0) | (label >= logits.shape[-1]))).sum(dtype=jnp.int32),
        }
        if per_class:
            classes = logits.shape[-1]
            counted = valid & ~jnp.isnan(logits).any(-1)
            zeros = jnp.zeros((classes, classes), jnp.int32)
            counts["class_count"] = zeros[0].at[label].add(valid.astype(jnp.int32))
            counts["confusion"] = zeros.at[label, logits.argmax(-1)].add(counted.astype(jnp.int32))
        return on_every_device(counts)

    return step


def _add(totals: dict[str, Metrics], counts: dict[str, Metrics]) -> None:
    """Add one batch's counts on the host: whole numbers of any size, losses in float64."""
    for name, batch in jax.device_get(counts).items():
        for key, value in batch.items():
            value = value.astype(np.int64) if value.ndim else value.item()
            totals[name][key] = totals[name].get(key, 0) + value


def _shares(total: Metrics) -> ClassificationScores:
    if not total.get("count"):
        raise UserError("there is no valid image to evaluate: check data.eval_split and data.path.")
    if wrong := total["no_class"]:
        raise UserError(
            f"{wrong} of {total['count']} images {'has' if wrong == 1 else 'have'} a label that is none of the "
            "model's classes (0 to classes - 1). Leave them out, or set `valid` to False for them."
        )
    count = total["count"]
    shares = {key: total[key] / count for key in ("top1", "top5", "loss")}
    by_class: ClassificationScores = {
        key: total[key] for key in ("class_count", "confusion") if key in total
    }
    return {"count": count, **shares, **by_class}

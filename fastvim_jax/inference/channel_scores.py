"""Accuracy of a trained model by the channels that it sees: which stain matters, and how few will do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fastvim_jax.data.cells import make_eval_iterator, take_channels
from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.labelled import make_preprocess
from fastvim_jax.errors import UserError, require_texts, suggest
from fastvim_jax.inference.channel_model import channel_data
from fastvim_jax.training.channel_weights import require_places
from fastvim_jax.training.classification.evaluation import evaluate_weights, make_eval_step
from fastvim_jax.training.run_folder import load_run


@dataclasses.dataclass(frozen=True)
class SubsetScore:
    """Accuracy of a model with some of its channels.

    Attributes:
        channels: their names.
        count: images.
        top1: share of them that is right, from 0 to 1.
        loss: mean cross entropy.
    """

    channels: tuple[str, ...]
    count: int
    top1: float
    loss: float


def score_subsets(
    run_dir: Path | str,
    subsets: Sequence[Sequence[str]],
    *,
    weights: str | None = None,
    **changes: Any,
) -> list[SubsetScore]:
    """Evaluate a run on each subset of channels, in one pass over the images; one program is compiled a channel count.

    Args:
        run_dir: the run folder, of a run on `CellsData`.
        subsets: names of channels, in the order in which the model is to see them.
        weights: `raw` or `ema`; None: what `load_run` takes.
        **changes: fields of the run's data to change, for example `eval_split`.

    Raises:
        UserError: the run has no channels by name, a name is none of them, or `channel_names` has them at other places.
    """
    run = load_run(run_dir, weights=weights)
    own = channel_data(run.config, run_dir)
    data = dataclasses.replace(own, **changes, eval_channels=())
    require_places(own, data)
    ids = [_numbers(data, require_texts(subset, "subset")) for subset in subsets]
    graphdef, params = nnx.split(run.model)
    eval_step = make_eval_step(graphdef, preprocess=make_preprocess(data))

    def step(subset: int, batch: Any) -> Any:
        return eval_step(params, take_channels(batch, np.asarray(ids[subset], np.int32)))

    batches = make_eval_iterator(data)
    try:
        numbers = {str(number): number for number in range(len(ids))}
        scores = evaluate_weights(step, numbers, batches)
    finally:
        batches.close()
    return [
        SubsetScore(tuple(subset), found["count"], found["top1"], found["loss"])
        for subset, found in zip(subsets, scores.values(), strict=True)
    ]


def _numbers(data: CellsData, subset: tuple[str, ...]) -> tuple[int, ...]:
    """Return the numbers of a subset's channels."""
    text = "+".join(subset)
    if not text or len(set(subset)) < len(subset):
        raise UserError(f"the subset {text!r} must name one channel or several different ones.")
    if unknown := [name for name in subset if name not in data.names]:
        raise UserError(
            f"the subset {text!r} names {unknown[0]!r}, but the model's channels are {', '.join(data.names)}."
            f"{suggest(unknown[0], data.names)}"
        )
    return tuple(data.names.index(name) for name in subset)


def default_subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """List all channels, all but one for each, and each by itself."""
    names = tuple(names)
    without = [tuple(n for n in names if n != name) for name in names] if len(names) > 2 else []
    return [names, *without, *((name,) for name in names if len(names) > 1)]


def as_table(scores: Sequence[SubsetScore], names: Sequence[str]) -> str:
    """Write the scores as a Markdown table, with a mark for every channel that is seen."""
    lines = [
        f"| {' | '.join(names)} | channels | top-1 % | loss |",
        f"|{':-:|' * len(names)}--:|--:|--:|",
    ]
    for score in scores:
        marks = " | ".join("x" if name in score.channels else "" for name in names)
        lines.append(
            f"| {marks} | {len(score.channels)} | {100 * score.top1:.2f} | {score.loss:.4f} |"
        )
    return "\n".join(lines)


def draw(scores: Sequence[SubsetScore], names: Sequence[str], picture: Path | str) -> None:
    """Draw the accuracy without each channel, and with it alone, as bars beside that of all channels."""
    import matplotlib.pyplot as plt

    by_channels = {frozenset(score.channels): 100 * score.top1 for score in scores}
    every = by_channels.get(frozenset(names))
    figure, axes = plt.subplots(figsize=(1.5 + 0.9 * len(names), 4), layout="constrained")
    for shift, label, wanted in (
        (-0.2, "without it", lambda name: frozenset(names) - {name}),
        (0.2, "it alone", lambda name: frozenset({name})),
    ):
        heights = [by_channels.get(wanted(name), float("nan")) for name in names]
        axes.bar([i + shift for i in range(len(names))], heights, 0.38, label=label)
    if every is not None:
        axes.axhline(every, color="black", lw=1, label=f"all channels: {every:.1f} %")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    highest = max([*by_channels.values(), 1.0])
    axes.set(ylabel="top-1 %", title="Which channel matters", ylim=(0, 1.35 * highest))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.legend(fontsize=8, loc="upper right")  # The room above the bars is for it.
    figure.savefig(picture, dpi=120)
    plt.close(figure)

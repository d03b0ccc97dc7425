"""Draw a run: its curves, and images with the model's predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from fastvim_jax.analysis.headline import Headline

# Distinct for colour-blind readers and in print.
_TRAIN, _RAW, _EMA = "#8a94a6", "#1f6fb4", "#e07b39"
_RIGHT, _WRONG, _INK = "#2a7f62", "#c0392b", "#2b2f36"
_COLUMNS = 6
_Place = Literal["upper right", "best"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image and what a model says about it."""

    image: UInt8[np.ndarray, "h w c"]
    """Pixels, c of 1 or 3."""
    truth: str
    """Name of its class."""
    prediction: str
    """Name of the most probable class."""
    probability: float
    """Its probability, from 0 to 1."""

    @property
    def right(self) -> bool:
        """Whether the most probable class is the true one."""
        return self.prediction == self.truth


def plot_run(
    records: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    mistakes: Sequence[Sample],
    file: Path | str,
    *,
    title: str,
    headline: Headline,
    mistakes_in_all: int | None = None,
) -> None:
    """Draw a run as one picture: loss and accuracy on the left, images with predictions on the right.

    Args:
        records: the run's metrics: lines of `kind` "train" (`epoch`, `loss`) and "eval" (`epoch`,
            `raw_top1`, `ema_top1`, `raw_loss`, ...).
        samples: images to show, classified rightly or wrongly; the first 18 are shown, or 24 if there is no mistake.
        mistakes: wrongly classified images; the first 6 are shown.
        file: the PNG to write.
        title: text above the picture.
        headline: the score to draw.
        mistakes_in_all: how many mistakes there were; by default `len(mistakes)`.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(13, 7), dpi=110, facecolor="white", layout=layout)
    figure.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold", color=_INK)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15), wspace=0.02)
    left, right = halves
    loss, accuracy = left.subplots(2, 1, sharex=True)
    draw_loss(loss, records, headline)
    draw_score(accuracy, records, headline)
    _draw_samples(right, samples, mistakes, mistakes_in_all or len(mistakes))
    figure.savefig(file)


def draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]], headline: Headline) -> None:
    """Draw training and held-out loss over the epochs."""
    lines = _lines(records, "loss")
    train = [r for r in records if r.get("kind") == "train" and "loss" in r]
    axes.plot(
        [r["epoch"] for r in train], [r["loss"] for r in train],
        color=_TRAIN, linewidth=1.6, label="training",
    )  # fmt: skip
    _draw_lines(axes, lines)
    values = [r["loss"] for r in train] + [v for _, _, ys in lines.values() for v in ys]
    if values and min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    dress(axes, headline.loss, "Loss", legend="best")


def draw_score(axes: Axes, records: Sequence[Mapping[str, Any]], headline: Headline) -> None:
    """Draw the headline's score of the raw and the averaged weights over the epochs."""
    lines = _lines(records, headline.score)
    _draw_lines(axes, lines)
    values = [v for _, _, ys in lines.values() for v in ys]
    if headline.percent:
        if values:
            low = max(0.0, min(values) - 0.05 * (1.02 - min(values)))
            axes.set_ylim(low, 1 + 0.03 * (1 - low))  # 100 % is the highest tick.
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    dress(axes, headline.label, headline.title, legend="best")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _lines(
    records: Sequence[Mapping[str, Any]], score: str
) -> dict[str, tuple[str, list[float], list[float]]]:
    """Return label → (colour, epochs, values) for each set of weights, raw or averaged, that was evaluated."""
    names = {"raw": ("held out", _RAW), "ema": ("held out, averaged weights", _EMA)}
    lines = {}
    for weights, (label, colour) in names.items():
        found = [r for r in records if r.get("kind") == "eval" and f"{weights}_{score}" in r]
        if found:
            lines[label] = (
                colour,
                [float(r["epoch"]) for r in found],
                [float(r[f"{weights}_{score}"]) for r in found],
            )
    return lines


def _draw_lines(axes: Axes, lines: Mapping[str, tuple[str, list[float], list[float]]]) -> None:
    for label, (colour, epochs, values) in lines.items():
        axes.plot(
            epochs, values, color=colour, linewidth=1.6, marker="o", markersize=4, label=label
        )


def dress(axes: Axes, unit: str, title: str, legend: _Place = "upper right") -> None:
    """Give a panel its title, unit, light grid and legend."""
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_ylabel(unit)
    axes.grid(axis="y", color="#e6e8ec")
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, edgecolor="none", framealpha=0.85, fontsize=9, loc=legend)


def _draw_samples(
    figure: SubFigure, samples: Sequence[Sample], mistakes: Sequence[Sample], in_all: int
) -> None:
    if not mistakes:
        _draw_rows(figure, samples[: 4 * _COLUMNS], 4, "Held-out images, drawn at random")
        return
    halves: Any = figure.subfigures(2, 1, height_ratios=(3, 1.25))
    upper, lower = halves
    _draw_rows(upper, samples[: 3 * _COLUMNS], 3, "Held-out images, drawn at random")
    shown = min(len(mistakes), _COLUMNS)
    which = "All" if shown == in_all else f"{shown} of the"
    plural = "s" if in_all > 1 else ""
    title = f"{which} {in_all} mistake{plural}" if in_all > 1 else "The only mistake"
    _draw_rows(lower, mistakes[:shown], 1, title)


def _draw_rows(figure: SubFigure, samples: Sequence[Sample], rows: int, title: str) -> None:
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, color=_INK)
    cells = figure.subplots(rows, _COLUMNS, squeeze=False)
    for cell in cells.flat:
        cell.set_axis_off()
    for cell, sample in zip(cells.flat, samples, strict=False):
        _draw_sample(cell, sample)


def _draw_sample(axes: Axes, sample: Sample) -> None:
    """Draw an image. Its frame's colour and a mark in its caption both say whether the prediction is right."""
    grey = sample.image.shape[-1] == 1
    axes.imshow(
        sample.image[..., 0] if grey else sample.image,
        cmap="gray", vmin=0, vmax=255, interpolation="nearest",
    )  # fmt: skip
    colour = _RIGHT if sample.right else _WRONG
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2.5)
    mark = "✓" if sample.right else "✗"
    caption = f"{_short(sample.prediction)} {mark} {sample.probability:.0%}"
    if not sample.right:
        caption += f"\nis {_short(sample.truth)}"
    axes.set_title(caption, fontsize=9, color=colour, pad=4)


def _short(name: str, length: int = 13) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"

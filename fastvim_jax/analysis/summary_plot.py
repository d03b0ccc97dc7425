"""Draw a run's numbers in one picture: whether it learns, whether it is stable, and how well it uses the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.analysis.plots import draw_loss, draw_score, dress

Records = Sequence[Mapping[str, Any]]

# Distinct for colour-blind readers and in print.
_BLUE, _ORANGE, _GREY, _GREEN, _INK = "#1f6fb4", "#e07b39", "#8a94a6", "#2a7f62", "#2b2f36"


def plot_summary(records: Records, file: Path | str, *, title: str, headline: Headline) -> None:
    """Draw loss, score, learning rate, norms, throughput and where the time went over the epochs.

    Args:
        records: the lines of the run's `metrics.jsonl`.
        file: the PNG to write.
        title: text above the picture.
        headline: the score to draw.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(15, 7.5), dpi=100, facecolor="white", layout=layout)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
    panels: Any = figure.subplots(2, 3, sharex=True)
    (loss, score, rate), (norms, speed, time) = panels
    draw_loss(loss, records, headline)
    draw_score(score, records, headline)
    score.set_xlabel("")
    train = [record for record in records if record["kind"] == "train"]
    _draw_learning_rate(rate, train)
    _draw_norms(norms, train)
    _draw_speed(speed, train)
    _draw_time(time, train)
    for axes in (norms, speed, time):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file)


def _line(axes: Axes, train: Records, name: str, label: str, colour: str) -> bool:
    """Draw a number over the epochs. Return whether the log has it."""
    found = [record for record in train if name in record]
    axes.plot(
        [record["epoch"] for record in found], [record[name] for record in found],
        color=colour, linewidth=1.6, label=label, marker="o" if len(found) < 3 else None,
    )  # fmt: skip
    return bool(found)


def _draw_learning_rate(axes: Axes, train: Records) -> None:
    _line(axes, train, "learning_rate", "", _INK)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    dress(axes, "", "Learning rate")


def _draw_norms(axes: Axes, train: Records) -> None:
    _line(axes, train, "param_norm", "parameters", _GREY)
    _line(axes, train, "grad_norm", "gradient", _BLUE)
    _line(axes, train, "update_norm", "update", _ORANGE)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.35)  # Room for the legend above the lines.
    dress(axes, "Euclidean norm", "Norms")


def _draw_speed(axes: Axes, train: Records) -> None:
    _line(axes, train, "images_per_second", "", _BLUE)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    used = [record["mfu"] for record in train if "mfu" in record]
    reached = f", {sorted(used)[len(used) // 2]:.1%} of the device's peak (median)" if used else ""
    dress(axes, "images/s", f"Throughput{reached}")


def _draw_time(axes: Axes, train: Records) -> None:
    _line(axes, train, "data_wait", "waiting for data", _ORANGE)
    _line(axes, train, "dispatch", "dispatching the step", _GREY)
    _line(axes, train, "device_wait", "waiting for the device", _GREEN)
    axes.set_ylim(0, 1.38)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    dress(axes, "share of the steps' time", "Where the host's time goes")

"""Draw what models cost against the resolution of the image, counted from their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from fastvim_jax.analysis.figures import Inputs
from fastvim_jax.analysis.figures.style import (
    FAMILIES,
    FASTVIM,
    PIXELS,
    VIM,
    dress,
    log_pixels,
    new_figure,
    title_of,
)
from fastvim_jax.analysis.flops import gmacs, parallel_steps, scan_steps
from fastvim_jax.models import model_config

_SIZES = ("tiny", "base")
_NUDGE = {"vit": -3, "vim": 1, "fastvim": -8}  # Points, so that numbers do not overlap.
_SWEEP = (224, 384, 512, 768, 1024, 1536, 2048)


def gmacs_lines(size: str, pixels: Sequence[int] = _SWEEP) -> dict[str, list[float]]:
    """Return billions of multiply-adds per image at each resolution, for ViT, Vim and FastVim of one size."""
    names = [f"{family}_{size}_patch16_224" for family in ("vit", "vim", "fastvim")]
    return {name: [gmacs(model_config(name), side) for side in pixels] for name in names}


def draw_gmacs(inputs: Inputs) -> Figure:
    """Draw multiply-adds against resolution, one panel per model size."""
    figure = new_figure(9.5, 4, "Multiply-adds per image")
    panels: Any = figure.subplots(1, len(_SIZES))
    for axes, size in zip(panels, _SIZES, strict=True):
        for name, line in gmacs_lines(size).items():
            colour = FAMILIES[name.split("_")[0]]
            axes.plot(_SWEEP, line, color=colour, marker="o", markersize=4, label=title_of(name))
            axes.annotate(
                f"{line[-1]:,.0f}", (_SWEEP[-1], line[-1]), xytext=(6, _NUDGE[name.split("_")[0]]),
                textcoords="offset points", fontsize=8.5, color=colour,
            )  # fmt: skip
        log_pixels(axes)
        dress(axes, title=size.capitalize(), x="height and width in pixels", y="GMACs")
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def steps_lines(pixels: Sequence[int] = _SWEEP) -> dict[tuple[str, str], list[int]]:
    """Return the steps of one direction's scan by model and by kind of scan, "sequential" or "parallel"."""
    lines = {}
    for name in ("vim_tiny_patch16_224", "fastvim_tiny_patch16_224"):
        config = model_config(name)
        lines[name, "sequential"] = [max(scan_steps(config, side)) for side in pixels]
        lines[name, "parallel"] = [max(parallel_steps(config, side)) for side in pixels]
    return lines


def draw_scan_steps(inputs: Inputs) -> Figure:
    """Draw sequential and parallel steps of one scan against resolution."""
    figure = new_figure(7, 4.2, "Steps of one scan that depend on each other")
    axes = figure.subplots()
    for (name, kind), line in steps_lines().items():
        colour = VIM if name.startswith("vim") else FASTVIM
        axes.plot(
            _SWEEP, line, color=colour, marker="o", markersize=4,
            linestyle="-" if kind == "sequential" else ":", label=f"{title_of(name)[:-2]}, {kind}",
        )  # fmt: skip
        for i in (0, -1):
            axes.annotate(
                f"{line[i]:,}", (_SWEEP[i], line[i]), xytext=(0, 7 if kind == "sequential" else -14),
                textcoords="offset points", fontsize=8.5, color=colour, ha="center",
            )  # fmt: skip
    log_pixels(axes, PIXELS)
    axes.set_ylim(1.8, 40_000)
    dress(axes, x="height and width in pixels, patches of 16", y="steps")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure

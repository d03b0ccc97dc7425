"""Share colours, sizes and axes among the figures of the documentation."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

# Distinct for colour-blind readers and in print.
FASTVIM, VIM, VIT, GREY, INK = "#1f6fb4", "#e07b39", "#2a7f62", "#8a94a6", "#2b2f36"
FAMILIES = {"fastvim": FASTVIM, "vim": VIM, "vit": VIT}
PIXELS = (224, 512, 1024, 2048)


def new_figure(width: float | int, height: float | int, title: str) -> Figure:
    """Make a white figure, `width` by `height` inches, with a headline."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def family_of(model: str) -> str:
    """Return the family of a model's name: "fastvim", "vim" or "vit"."""
    return model.split("_")[0]


def title_of(model: str) -> str:
    """Shorten a model's name: `fastvim_tiny_patch16_224` becomes FastVim-T."""
    family, size = model.split("_")[:2]
    names = {"fastvim": "FastVim", "vim": "Vim", "vit": "ViT"}
    return f"{names.get(family, family)}-{size[0].upper()}"


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Give axes a title, labels and a light grid, and take the upper and right lines away."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color="#e6e8ec")
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def log_pixels(axes: Axes, pixels: Any = PIXELS) -> None:
    """Make both axes logarithmic, with one tick for each resolution."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(pixels)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))

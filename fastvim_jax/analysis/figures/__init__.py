"""Draw the figures of the documentation, from a model's configuration, recorded benchmarks or a fresh computation.

Each module here has functions that return the numbers of its figures and functions that draw them. `FIGURES` lists the
figures by name; `fastvim plot NAME` draws one.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from fastvim_jax.errors import UserError
from fastvim_jax.models.saving import IMAGENET_MEAN, IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Hold what figures read besides the code itself; each figure uses the part that it needs.

    Attributes:
        records: folder of the JSON files that `fastvim bench ... --json` writes.
        image: a photograph; None: one that comes with scikit-learn.
        model: a trained FastVim or Vim; None: models with random parameters.
        mean: of each channel, by which the model's images are normalised, for pixels from 0 to 1.
        std: of each channel, likewise.
    """

    records: Path | None = None
    image: Path | None = None
    model: Any = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """Name the function that draws a figure.

    Attributes:
        module: module in this package.
        function: `function(inputs)` returns a matplotlib figure.
        text: what the figure shows, in one line.
    """

    module: str
    function: str
    text: str


FIGURES = {
    "gmacs": FigureSpec(
        "costs",
        "draw_gmacs",
        "multiply-adds against resolution for ViT, Vim and FastVim (paper: Figure 4)",
    ),
    "scan-steps": FigureSpec(
        "costs", "draw_scan_steps", "sequential and parallel steps of one scan against resolution"
    ),
    "throughput": FigureSpec(
        "speed",
        "draw_throughput",
        "recorded images per second against resolution and model size (paper: Figures 5, 8-11)",
    ),
    "stages": FigureSpec(
        "speed",
        "draw_stages",
        "recorded time of each stage of the state-space part (paper: Figure 7, Table 23)",
    ),
    "receptive-field": FigureSpec(
        "receptive_field",
        "draw_receptive_field",
        "which patches reach the centre token after 1, 2, 4 and 8 blocks; takes a minute",
    ),
    "selection": FigureSpec(
        "selection", "draw_selection", "step size, B and C over the patches of a photograph"
    ),
}
"""The figures by name."""


def draw_figure(name: str, file: Path, inputs: Inputs) -> None:
    """Draw the figure called `name` and write it as a PNG.

    Args:
        name: one of `FIGURES`.
        file: the PNG to write; its folder is made.
        inputs: what the figure reads.

    Raises:
        UserError: an input that the figure needs is missing or unfit, or the file cannot be written.
    """
    spec = FIGURES[name]
    module = importlib.import_module(f"{__name__}.{spec.module}")
    figure = getattr(module, spec.function)(inputs)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="png", metadata={"Software": None})
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}. Give --out another file."
        ) from error

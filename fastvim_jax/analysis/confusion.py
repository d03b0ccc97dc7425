"""Draw a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

_NUMBERS = 20  # up to this number of classes, every cell shows its count
_NAMES = 60  # up to this number of classes, every row and column shows the name of its class


def plot_confusion(
    confusion: Int[np.ndarray, "classes classes"],
    class_names: Sequence[str],
    file: Path | str,
    *,
    title: str,
) -> None:
    """Draw a confusion matrix: counts in the cells, colours by the share of the row's images.

    Args:
        confusion: number of images by true class (row) and predicted class (column).
        class_names: in label order.
        file: the PNG to write; its folder is made.
        title: title of the picture.
    """
    count = len(class_names)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(3.5 + 0.42 * count, 14)
    figure = Figure(figsize=(side + 1, side), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=class_names).plot(
        include_values=count <= _NUMBERS,
        cmap="Blues",
        ax=axes,
        colorbar=False,
        im_kw={"vmin": 0, "vmax": max(shares.max(), 1e-9)},
        text_kw={"fontsize": 8},
    )
    if (
        display.text_ is not None
    ):  # The library writes shares into the cells; replace them by counts.
        for text, images in zip(display.text_.flat, confusion.flat, strict=True):
            text.set_text(f"{images}" if images else "")
    axes.set_title(title, loc="left", fontsize=11)
    if count <= _NAMES:
        size = 9 if count <= _NUMBERS else 6
        axes.tick_params(labelsize=size)
        for label in axes.get_xticklabels():
            label.set(rotation=60, ha="right")
    else:
        axes.set(xticks=[], yticks=[])
    bar: Any = figure.colorbar(display.im_, ax=axes, fraction=0.04)
    bar.set_label("share of the class's images")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png")

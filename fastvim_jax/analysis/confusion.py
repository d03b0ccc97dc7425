"""A picture of which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

_NUMBERS = 20  # classes up to which every cell tells its count
_NAMES = 60  # and every row its class


def plot_confusion(
    confusion: Int[np.ndarray, "classes classes"],
    class_names: Sequence[str],
    file: Path | str,
    *,
    title: str,
) -> None:
    """Draw a confusion matrix; a row's shades are shares of that class's images.

    Args:
        confusion: images of the class of the row taken for that of the column.
        class_names: in label order.
        file: the PNG to write; its folder is made.
        title: the headline.
    """
    count = len(class_names)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(3.5 + 0.42 * count, 14)
    figure = Figure(figsize=(side + 1, side), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(
        shares, cmap="Blues", vmin=0, vmax=max(shares.max(), 1e-9), interpolation="nearest"
    )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    if count <= _NAMES:
        size = 9 if count <= _NUMBERS else 6
        axes.set_xticks(range(count), class_names, rotation=60, ha="right", fontsize=size)
        axes.set_yticks(range(count), class_names, fontsize=size)
    if count <= _NUMBERS:
        for (row, column), images in np.ndenumerate(confusion):
            if images:
                ink = "white" if 2 * shares[row, column] > shares.max() else "#2b2f36"
                axes.text(column, row, f"{images}", ha="center", va="center", fontsize=8, color=ink)
    bar: Any = figure.colorbar(picture, ax=axes, fraction=0.04)
    bar.set_label("share of the class's images")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png")

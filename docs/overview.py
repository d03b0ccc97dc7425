"""Draws the README's picture: what the scan of a block visits in Vim and in FastVim.

python docs/overview.py docs/overview.svg
"""

from __future__ import annotations

import sys

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROWS, COLUMNS = 4, 5
INK, QUIET, SCAN = "#1f2933", "#7b8794", "#d64545"
PALETTE = ["#2f6690", "#3a9188", "#e0a030", "#8e5ea2", "#5a7d2a"]


def tint(colour: str, amount: float) -> tuple[float, ...]:
    """Mix a colour with white; 0 leaves it alone."""
    return tuple(c + (1 - c) * amount for c in to_rgb(colour))


def cell(axes: Axes, x: float, y: float, colour: object) -> None:
    """Draw one token, its lower left corner at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x + 0.09, y + 0.09),
            0.82,
            0.82,
            boxstyle="round,pad=0,rounding_size=0.16",
            fc=colour,
            ec="none",
        )
    )


def grid(axes: Axes, x: float, y: float, by: str, strength: float = 0.0) -> None:
    """Draw the grid of tokens with its upper left corner at (x, y), coloured by row or by column."""
    for row in range(ROWS):
        for column in range(COLUMNS):
            group, along = (row, column) if by == "row" else (column, row)
            shade = strength if strength else (0.12 * along if by != "none" else 0.75)
            colour = PALETTE[group] if by != "none" else QUIET
            cell(axes, x + column, y - row - 1, tint(colour, shade))


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object
) -> None:
    """Draw a plain arrow."""
    options = {"color": INK, "lw": 1.6, "arrowstyle": "-|>", "mutation_scale": 12} | style
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **options))


def label(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    """Write centred text."""
    axes.text(
        x, y, text, **({"ha": "center", "va": "center", "color": INK, "fontsize": 10} | style)
    )


def draw_vim(axes: Axes) -> None:
    """Draw Vim's scan, whose every token is a step: the path runs row by row through the grid."""
    grid(axes, 0, ROWS, "none")
    for row in range(ROWS):
        y = ROWS - row - 0.5
        arrow(
            axes,
            (0.3, y),
            (COLUMNS - 0.3, y),
            color=SCAN,
            arrowstyle="-|>" if row == ROWS - 1 else "-",
        )
        if row < ROWS - 1:
            axes.plot([COLUMNS - 0.3, 0.3], [y, y - 1], color=SCAN, lw=0.9, ls=(0, (2, 2)))


def step(axes: Axes, x: float, text: str) -> None:
    """Draw a labelled arrow of length 1.4 that starts at x."""
    arrow(axes, (x, ROWS / 2), (x + 1.4, ROWS / 2))
    label(axes, x + 0.7, ROWS / 2 + 0.45, text, fontsize=9)


def draw_rows(axes: Axes, x: float) -> None:
    """Draw even blocks: each row's mean is a step, and its result goes back to the whole row."""
    grid(axes, x, ROWS, "row")
    step(axes, x + COLUMNS + 0.25, "pool")
    middle = x + COLUMNS + 2.4
    for row in range(ROWS):
        cell(axes, middle, ROWS - row - 1, PALETTE[row])
    arrow(axes, (middle - 0.2, ROWS - 0.1), (middle - 0.2, 0.1), color=SCAN)
    arrow(axes, (middle + 1.2, 0.1), (middle + 1.2, ROWS - 0.1), color=SCAN)
    step(axes, middle + 1.6, "repeat")
    grid(axes, middle + 3.25, ROWS, "row", strength=0.3)


def draw_columns(axes: Axes, x: float) -> None:
    """Draw odd blocks: the same along the other axis."""
    grid(axes, x, ROWS, "column")
    step(axes, x + COLUMNS + 0.25, "pool")
    middle = x + COLUMNS + 1.9
    for column in range(COLUMNS):
        cell(axes, middle + column, ROWS / 2 - 0.5, PALETTE[column])
    arrow(
        axes, (middle + 0.1, ROWS / 2 + 0.7), (middle + COLUMNS - 0.1, ROWS / 2 + 0.7), color=SCAN
    )
    arrow(
        axes, (middle + COLUMNS - 0.1, ROWS / 2 - 0.7), (middle + 0.1, ROWS / 2 - 0.7), color=SCAN
    )
    step(axes, middle + COLUMNS + 0.25, "repeat")
    grid(axes, middle + COLUMNS + 1.9, ROWS, "column", strength=0.3)


def main(path: str) -> None:
    """Draw all three and write the file."""
    matplotlib.rcParams |= {"svg.hashsalt": "fastvim", "font.family": "DejaVu Sans"}
    widths = [COLUMNS, 2 * COLUMNS + 5.65, 3 * COLUMNS + 3.8]
    gap, x = 3.2, 0.0
    figure, axes = plt.subplots(figsize=(14.6, 2.6))
    draw_vim(axes)
    titles = [
        ("Vim", "one scan step per patch: 196 at 224 px"),
        ("FastVim, blocks 0, 2, 4 …", "scan over the means of the rows: 14 steps"),
        ("FastVim, blocks 1, 3, 5 …", "scan over the means of the columns: 14 steps"),
    ]
    for width, (title, subtitle), draw in zip(
        widths, titles, (None, draw_rows, draw_columns), strict=True
    ):
        if draw is not None:
            draw(axes, x)
        label(axes, x + width / 2, ROWS + 1.35, title, fontsize=12.5, weight="bold")
        label(axes, x + width / 2, ROWS + 0.62, subtitle, color=QUIET)
        x += width + gap
    total = x - gap
    label(
        axes,
        total / 2,
        -0.75,
        "Red: the scan, in both directions. The short convolution, the gate and the skip still see every patch.",
        color=QUIET,
    )
    axes.set(xlim=(-0.3, total + 0.3), ylim=(-1.2, ROWS + 1.9), aspect="equal")
    axes.axis("off")
    figure.savefig(
        path,
        bbox_inches="tight",
        pad_inches=0.15,
        facecolor="white",
        dpi=110,
        metadata={"Date": None} if path.endswith("svg") else None,
    )


if __name__ == "__main__":
    main(sys.argv[1])

"""Draw label maps: classes as colours over the image, and grids of such pictures by which people judge a run."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

Pixels = UInt8[np.ndarray, "h w 3"]
AnyPixels = UInt8[np.ndarray, "_h _w 3"]
"""Like `Pixels`, but each image of a list may have its own size."""
_TEXT = 16  # height of a line of text, in pixels
_GAP = 4  # between pictures, in pixels


def class_colours(classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """Return a colour for each class, the same in every run. Consecutive classes are far apart in hue."""
    golden = 0.61803398875
    colours = [
        colorsys.hsv_to_rgb(
            (i * golden) % 1.0, (0.9, 0.6, 0.75)[i % 3], (0.95, 0.8, 0.6)[i // 3 % 3]
        )
        for i in range(classes)
    ]
    return (np.asarray(colours) * 255).round().astype(np.uint8)


def overlay(image: Pixels, labels: Int[np.ndarray, "h w"], classes: int) -> Pixels:
    """Draw classes over an image, half transparent. Pixels without a class (label `classes` or more) stay grey."""
    grey = image.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    colours = np.concatenate([class_colours(classes), np.zeros((1, 3), np.uint8)])
    drawn = colours[np.minimum(labels, classes)]
    share = np.where(labels < classes, 0.55, 0.0)[..., None]
    return (image * 0.25 + grey * 0.2 + drawn * share + grey * (0.55 - share)).astype(np.uint8)


def picture_grid(
    rows: Sequence[tuple[str, Sequence[AnyPixels]]], *, width: int = 320
) -> Image.Image:
    """Lay out pictures row by row, each `width` pixels wide, with a line of text above each row."""
    drawn = [
        (title, [Image.fromarray(p).resize((width, _height(p, width))) for p in pictures])
        for title, pictures in rows
    ]
    columns = max(len(pictures) for _, pictures in drawn)
    heights = [_TEXT + max(p.height for p in pictures) + _GAP for _, pictures in drawn]
    sheet = Image.new("RGB", (columns * (width + _GAP), sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for (title, pictures), height in zip(drawn, heights, strict=True):
        pen.text((2, top + 2), title, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (column * (width + _GAP), top + _TEXT))
        top += height
    return sheet


def _height(picture: Pixels, width: int) -> int:
    return max(1, round(picture.shape[0] * width / picture.shape[1]))

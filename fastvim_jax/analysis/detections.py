"""Draw detected objects over an image: boxes with captions, and masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from fastvim_jax.analysis.overlays import class_colours

Pixels = UInt8[np.ndarray, "h w 3"]
Drawn = tuple[np.ndarray, str, np.ndarray | None]
"""A box (x1, y1, x2, y2) in pixels, its caption, and its boolean mask `h w` or None."""


def draw_objects(image: Pixels, objects: Sequence[Drawn]) -> Pixels:
    """Draw objects over an image, later ones on top.

    A caption is a class, or a class, a space and a score. Objects of one class share a colour.
    """
    pixels = image.astype(np.float32)
    names = sorted({_class_of(caption) for _, caption, _ in objects})
    colours = dict(zip(names, class_colours(max(len(names), 1)), strict=False))
    for _, caption, mask in objects:
        if mask is not None:
            pixels[mask] = 0.5 * pixels[mask] + 0.5 * colours[_class_of(caption)]
    picture = Image.fromarray(pixels.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    thickness = max(1, max(picture.size) // 300)
    for box, caption, _ in objects:
        colour = tuple(int(c) for c in colours[_class_of(caption)])
        x1, y1, x2, y2 = (float(v) for v in box)
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=thickness)
        place = pen.textbbox((x1 + 2, y1 + 1), caption)
        pen.rectangle(place, fill=colour)
        pen.text((x1 + 2, y1 + 1), caption, fill="white")
    return np.asarray(picture)


def _class_of(caption: str) -> str:
    return caption.rpartition(" ")[0] or caption

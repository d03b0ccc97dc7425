"""Resize, crop, flip and pad images together with their masks and boxes, as NumPy arrays. The caller makes all draws.

Coordinates are continuous: pixel (row i, column j) covers [j, j + 1] x [i, i + 1], and a box is (x1, y1, x2, y2).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped, UInt8


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image with its mask and boxes; parts that it does not have are None.

    Attributes:
        image: uint8 pixels.
        mask: the pixels' labels `h w`, or masks of n objects `n h w`; any dtype.
        boxes: (x1, y1, x2, y2) of n objects.
    """

    image: UInt8[np.ndarray, "h w c"]
    mask: Shaped[np.ndarray, "*n h w"] | None = None
    boxes: Float[np.ndarray, "n 4"] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]


def fitted_size(size: tuple[int, int], long: int | float, short: int | float) -> tuple[int, int]:
    """Return the largest size of the same aspect whose sides fit into `long` and `short`, rounded half up.

    A strip keeps at least one pixel in its width.

    Args:
        size: height and width.
        long: upper bound of the longer side.
        short: upper bound of the shorter side.
    """
    factor = min(long / max(size), short / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def resize(scene: Scene, size: tuple[int, int]) -> Scene:
    """Resize to `size` (height, width): image bilinear, mask nearest, boxes scaled."""
    if scene.size == tuple(size):
        return scene
    factors = np.asarray([size[1] / scene.size[1], size[0] / scene.size[0]] * 2)
    return Scene(
        resize_image(scene.image, size),
        None if scene.mask is None else resize_mask(scene.mask, size),
        None if scene.boxes is None else (scene.boxes * factors).astype(scene.boxes.dtype),
    )


def crop(scene: Scene, top: int, left: int, size: tuple[int, int]) -> Scene:
    """Cut out `size` (height, width), or less at the image's border. Boxes are clipped, and may become empty."""
    height, width = min(size[0], scene.size[0] - top), min(size[1], scene.size[1] - left)
    rows, columns = slice(top, top + height), slice(left, left + width)
    boxes = scene.boxes
    if boxes is not None:
        moved = boxes - np.asarray([left, top] * 2, boxes.dtype)
        boxes = np.clip(moved, 0, np.asarray([width, height] * 2, boxes.dtype))
    mask = None if scene.mask is None else scene.mask[..., rows, columns]
    return Scene(scene.image[rows, columns], mask, boxes)


def flip(scene: Scene) -> Scene:
    """Mirror left and right."""
    boxes = scene.boxes
    if boxes is not None:
        x1, y1, x2, y2 = boxes.T
        boxes = np.stack([scene.size[1] - x2, y1, scene.size[1] - x1, y2], axis=1)
    mask = None if scene.mask is None else scene.mask[..., ::-1]
    return Scene(scene.image[:, ::-1], mask, boxes)


def pad(scene: Scene, size: tuple[int, int], *, image: int = 0, mask: int = 0) -> Scene:
    """Extend image and masks to `size` (height, width) with these values, at the bottom and right. Boxes stay."""
    below, right = size[0] - scene.size[0], size[1] - scene.size[1]
    margins = ((0, below), (0, right))
    padded = np.pad(scene.image, (*margins, (0, 0)), constant_values=image)
    masks = scene.mask
    if masks is not None:
        masks = np.pad(masks, ((0, 0),) * (masks.ndim - 2) + margins, constant_values=mask)
    return Scene(padded, masks, scene.boxes)


def resize_image(
    image: UInt8[np.ndarray, "h w c"],
    size: tuple[int, int],
    *,
    top: int = 0,
    left: int = 0,
    region: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "m n c"]:
    """Resize (bilinear, half-pixel centres, borders clamped, no antialiasing), rounded to the nearest level.

    Args:
        image: uint8 pixels.
        size: height and width of the resized image.
        top, left: upper left corner, in the resized image, of the region to compute.
        region: height and width of this region; None: all of the image. Only the region's pixels are computed.
    """
    height, width = (size[0] - top, size[1] - left) if region is None else region
    if tuple(size) == image.shape[:2]:
        return image[top : top + height, left : left + width]
    row, next_row, down = _taps(image.shape[0], size[0], top, height)
    column, next_column, across = _taps(image.shape[1], size[1], left, width)
    first, last = row.min(), next_row.max() + 1
    strip = image[first:last]
    # Interpolate columns first, then rows, in float32: its rounding is about 1e-5 grey levels.
    across = across.astype(np.float32)[:, None]
    narrow = strip[:, column].astype(np.float32)
    narrow += (strip[:, next_column] - narrow) * across
    down = down.astype(np.float32)[:, None, None]
    result = narrow[row - first]
    result += (narrow[next_row - first] - result) * down
    result += 0.5
    return result.astype(np.uint8)


def resize_mask(
    mask: Shaped[np.ndarray, "*n h w"], size: tuple[int, int]
) -> Shaped[np.ndarray, "*n i j"]:
    """Resize to the nearest pixel: row or column i of m reads row or column floor(i n / m) of n."""
    rows, columns = (np.arange(m) * n // m for n, m in zip(mask.shape[-2:], size, strict=True))
    return mask[..., rows[:, None], columns]


def _taps(
    source: int, target: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for `count` places from `start`, the lower and the upper neighbour, and the weight of the upper one."""
    place = (np.arange(start, start + count) + 0.5) * source / target - 0.5
    place = np.clip(place, 0, source - 1)
    low = np.floor(place).astype(np.int64)
    return low, np.minimum(low + 1, source - 1), place - low

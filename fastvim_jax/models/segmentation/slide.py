"""Segment an image by slide inference: predict overlapping windows and average their logits.

1. Cut windows. A side has max(side - crop + stride - 1, 0) // stride + 1 of them. The last window is moved back so that
   it ends at the border. A side smaller than the crop is used whole.
2. Resize the logits of each window to the window, add them up, and divide by the number of windows that saw the pixel.
3. Resize the average to the original size and take the class of the largest logit, the lowest number among equals.

Images have many sizes, and each compiled program has one. So sums are kept on a canvas whose sides are rounded up to
`bucket` pixels, and the last resize is a product with matrices that are arguments: one program serves all image sizes
that round to the same canvas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from fastvim_jax.layers.resize import linear_matrix, resize_bilinear

Windows = Shaped[np.ndarray, "n h w c"]
Predict = Callable[[Windows], Float[Array, "n rows columns classes"]]
"""Function from windows (pixels in the caller's form) to logits of any size. The caller compiles it."""
_BLOCK = 128
"""Rows that are turned into classes at a time, because the logits of a whole large photograph fill gigabytes."""


def window_corners(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the top left corners (row, column) of all windows of an image of `size`, row by row."""
    starts = []
    for side, window, step in zip(size, crop, stride, strict=True):
        count = max(side - window + step - 1, 0) // step + 1
        starts.append([max(min(i * step, side - window), 0) for i in range(count)])
    return [(top, left) for top in starts[0] for left in starts[1]]


def merge_windows(
    logits: Float[Array, "n rows columns classes"],
    corners: Int[Array, "n 2"],
    real: Bool[Array, " n"],
    *,
    window: tuple[int, int],
    canvas: tuple[int, int],
) -> Float[Array, "height width classes"]:
    """Average the logits of all windows on the `canvas`; pixels that no window saw are 0.

    Args:
        logits: logits of each window, at any size.
        corners: top left corner of each window.
        real: False for windows that only fill up the batch.
        window: height and width of the windows.
        canvas: height and width of the result.
    """

    def add(sums, one):
        total, visits = sums
        small, corner, counts = one
        at = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        large = resize_bilinear(small[None], window)[0] * counts
        ones = jnp.full((*window, 1), counts, total.dtype)
        for_total = jax.lax.dynamic_slice(total, at, large.shape) + large
        for_visits = jax.lax.dynamic_slice(visits, at, ones.shape) + ones
        total = jax.lax.dynamic_update_slice(total, for_total, at)
        visits = jax.lax.dynamic_update_slice(visits, for_visits, at)
        return (total, visits), None

    zeros = [jnp.zeros((*canvas, n), logits.dtype) for n in (logits.shape[-1], 1)]
    counts = real.astype(logits.dtype)
    (total, visits), _ = jax.lax.scan(add, tuple(zeros), (logits, corners, counts))
    return total / jnp.maximum(visits, 1)


@partial(jax.jit, static_argnames=("window", "canvas"))
def _classes(logits, corners, real, rows, columns, *, window, canvas):
    """Merge windows and return the class of every pixel of the original size, int32 `blocks*m n`.

    Args:
        logits, corners, real, window, canvas: as for `merge_windows`.
        rows: matrices that resize the canvas's rows, `blocks m height`.
        columns: matrix that resizes the canvas's columns, `n width`.
    """
    merged = merge_windows(logits, corners, real, window=window, canvas=canvas)
    across = jnp.einsum("nw,hwc->hnc", columns.astype(merged.dtype), merged, precision="highest")

    def block(rows):
        resized = jnp.einsum("mh,hnc->mnc", rows.astype(merged.dtype), across, precision="highest")
        return jnp.argmax(resized, axis=-1).astype(jnp.int32)

    return jax.lax.map(block, rows).reshape(-1, columns.shape[0])


@dataclasses.dataclass(frozen=True)
class Slide:
    """Say how an image is cut into windows, and segment it when called.

    Attributes:
        crop: height and width of a window.
        stride: rows and columns from one window to the next.
        batch: number of windows per call of `predict`. The last call is filled up to it.
        bucket: sides of canvas and result are rounded up to multiples of this.
    """

    crop: tuple[int, int]
    stride: tuple[int, int]
    batch: int = 4
    bucket: int = 256

    def __call__(
        self,
        predict: Predict,
        image: Shaped[np.ndarray, "h w c"],
        size: tuple[int, int] | None = None,
        *,
        mirrored: bool = False,
    ) -> Int[Array, "height width"]:
        """Predict the class of every pixel.

        Args:
            predict: computes the logits of a batch of windows.
            image: the image, resized for the model.
            size: original height and width, to which logits are resized; None: those of `image`.
            mirrored: whether `image` was mirrored left to right; the result is then mirrored back.

        Returns:
            Classes, int32, on the device. Its sides are `size` rounded up to the bucket; the caller cuts off the rest.
        """
        height, width = image.shape[:2]
        size = (height, width) if size is None else size
        window = min(height, self.crop[0]), min(width, self.crop[1])
        corners = window_corners((height, width), self.crop, self.stride)
        count = -(-len(corners) // self.batch) * self.batch
        padded = [*corners, *[corners[0]] * (count - len(corners))]
        pixels = np.stack([image[t : t + window[0], l : l + window[1]] for t, l in padded])
        parts = [predict(pixels[i : i + self.batch]) for i in range(0, count, self.batch)]
        canvas = self._round(height), self._round(width)
        rows = np.zeros((self._round(size[0], _BLOCK), canvas[0]))
        columns = np.zeros((self._round(size[1]), canvas[1]))
        rows[: size[0], :height] = linear_matrix(height, size[0])
        across = linear_matrix(width, size[1])
        columns[: size[1], :width] = across[:, ::-1] if mirrored else across
        return _classes(
            parts[0] if len(parts) == 1 else jnp.concatenate(parts),
            np.asarray(padded, np.int32),
            np.arange(count) < len(corners),
            rows.reshape(-1, min(_BLOCK, len(rows)), canvas[0]),
            columns,
            window=window,
            canvas=canvas,
        )

    def _round(self, side: int, least: int = 1) -> int:
        step = max(self.bucket, least)
        return -(-side // step) * step

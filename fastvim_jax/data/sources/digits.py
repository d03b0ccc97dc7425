"""Read the handwritten digits that ship with scikit-learn: 1,797 greyscale images of 8 x 8 pixels."""

from __future__ import annotations

import numpy as np

from fastvim_jax.data.records import Record
from fastvim_jax.errors import UserError, suggest

HELD_OUT = 360
"""Number of images in the split "test", a fifth of all."""


class DigitsSource:
    """scikit-learn's `load_digits`; the last 360 images are the split "test", the others "train"."""

    def __init__(self, split: str) -> None:
        if split not in ("train", "test"):
            raise UserError(
                f"The digits have no split {split!r}: use train or test."
                + suggest(split, ("train", "test"))
            )
        # Imported here: scikit-learn takes a second, and only this source needs it.
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        part = slice(None, -HELD_OUT) if split == "train" else slice(-HELD_OUT, None)
        # Grey values run from 0 to 16.
        self._images = np.round(images[part] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        self._labels = labels[part].astype(np.int64)
        self._split = split
        self.class_names = tuple(str(digit) for digit in range(10))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        return Record(
            self._images[index], int(self._labels[index]), f"digits/{self._split}[{index}]"
        )

"""Intersection over union and accuracies of classes, from pixel counts summed over images.

Counts are exact whole numbers, so that they do not depend on how images are shared between devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int64, Integer

from fastvim_jax.data.segmentation import IGNORED


@dataclass(frozen=True)
class Areas:
    """Pixels of each class, int64: predicted and labelled, predicted, labelled. Ignored pixels count nowhere."""

    intersect: Int64[np.ndarray, " classes"]
    predicted: Int64[np.ndarray, " classes"]
    labelled: Int64[np.ndarray, " classes"]

    @staticmethod
    def zero(classes: int) -> Areas:
        """Return the counts before any pixel was seen."""
        return Areas(*(np.zeros(classes, np.int64) for _ in range(3)))

    def __add__(self, other: Areas) -> Areas:
        return Areas(
            self.intersect + other.intersect,
            self.predicted + other.predicted,
            self.labelled + other.labelled,
        )

    @property
    def union(self) -> Int64[np.ndarray, " classes"]:
        """Pixels predicted or labelled."""
        return self.predicted + self.labelled - self.intersect

    @property
    def iou(self) -> Float64[np.ndarray, " classes"]:
        """Intersection over union, NaN for classes without pixels."""
        return _ratio(self.intersect, self.union)

    @property
    def accuracy(self) -> Float64[np.ndarray, " classes"]:
        """Share of each class's labelled pixels found, NaN for classes without labelled pixels."""
        return _ratio(self.intersect, self.labelled)

    def scores(self) -> dict[str, float]:
        """Return `miou`, `macc` (means over classes with pixels) and `aacc` (share of all pixels), from 0 to 1."""
        return {
            "miou": _mean(self.iou),
            "macc": _mean(self.accuracy),
            "aacc": float(self.intersect.sum() / max(int(self.labelled.sum()), 1)),
        }


def count_areas(
    predicted: Integer[Array, "*pixels"], label: Integer[Array, "*pixels"], classes: int
) -> tuple[Array, Array, Array]:
    """Count pixels of each class, int32 `classes`: intersection, predicted, labelled; to be jitted."""
    valid = (label != IGNORED).ravel()
    predicted, label = predicted.ravel().astype(jnp.int32), label.ravel().astype(jnp.int32)
    nowhere = classes  # one more bin, for pixels that do not count

    def count(values: Array, counted: Array) -> Array:
        return jnp.bincount(jnp.where(counted, values, nowhere), length=classes + 1)[:classes]

    return (
        count(label, valid & (predicted == label)),
        count(predicted, valid),
        count(label, valid),
    )


def as_areas(counts: Iterable[jax.Array]) -> Areas:
    """Fetch one result of `count_areas`."""
    return Areas(*(np.asarray(count).astype(np.int64) for count in jax.device_get(tuple(counts))))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: np.ndarray) -> float:
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if seen.size else 0.0

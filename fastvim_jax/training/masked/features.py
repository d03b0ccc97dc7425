"""Compute features of a frozen backbone, once for all images or anew for every augmented batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fastvim_jax.data import BatchIterator
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.device_transforms import make_augment, make_preprocess
from fastvim_jax.errors import UserError
from fastvim_jax.training.steps import Batch, augment_key, gather_outside_blocks

Place = Callable[[Mapping[str, Any]], Batch]
Extract = Callable[[Any, Batch], jax.Array]


def make_extract(graphdef: nnx.GraphDef, data: ClassificationData) -> Extract:
    """Compile `extract(params, batch)`, which returns the input of the classifier's head for uint8 images, `b d`."""
    preprocess = make_preprocess(data)

    @jax.jit
    def extract(params: Any, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, gather_outside_blocks(params))
        return model.features(preprocess(batch["image"]))

    return extract


def make_augmented_extract(
    graphdef: nnx.GraphDef, data: ClassificationData, seed: int
) -> Callable[[Any, Batch, jax.Array], Batch]:
    """Compile `extract(params, batch, step)`, which returns `feature` and `label` of augmented images."""
    augment = make_augment(data, num_classes=1)

    @jax.jit
    def extract(params: Any, batch: Batch, step: jax.Array) -> Batch:
        model = nnx.merge(graphdef, gather_outside_blocks(params))
        images = augment(augment_key(seed, step), batch)["image"]
        return {"feature": model.features(images), "label": batch["label"]}

    return extract


@dataclass(frozen=True)
class Features:
    """Hold features `n d` float32 and labels `n` of the readable images of one split."""

    feature: np.ndarray
    label: np.ndarray


def compute_features(
    extract: Extract, params: Any, batches: BatchIterator, place: Place
) -> Features:
    """Compute the features of all images of one evaluation pass."""
    features, labels = [], []
    for batch in batches:
        valid = np.asarray(batch["valid"])
        placed = place({k: batch[k] for k in ("image", "label", "valid")})
        features.append(np.asarray(extract(params, placed), np.float32)[valid])
        labels.append(np.asarray(batch["label"])[valid])
    batches.rewind()
    return Features(np.concatenate(features), np.concatenate(labels))


class FeatureBatches:
    """Iterate endlessly over shuffled batches of cached features; see `training.loop.Batches`.

    Each epoch takes every image at most once, in an order drawn from seed and epoch. Images that do not fill a last
    batch are left out.
    """

    def __init__(self, features: Features, *, batch_size: int, seed: int, place: Place):
        self._features, self._batch_size, self._seed, self._place = (
            features, batch_size, seed, place
        )  # fmt: skip
        self._taken = 0
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self.steps_per_epoch = len(features.label) // batch_size
        self.corrupt: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, step = divmod(self._taken, self.steps_per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, rng.permutation(len(self._features.label)))
        chosen = self._order[1][step * self._batch_size : (step + 1) * self._batch_size]
        self._taken += 1
        return self._place(
            {"feature": self._features.feature[chosen], "label": self._features.label[chosen]}
        )

    def seconds_per_batch(self) -> float | None:
        """Return None, because the features are in memory and nothing is read."""
        return None

    def get_state(self) -> dict[str, Any]:
        """Return the number of batches taken."""
        return {"taken": self._taken}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken."""
        self._taken = int(state["taken"])


def require_same_features(folder: Path, position: Mapping[str, Any], *, cached: bool) -> None:
    """Compare how features are made with how they were made for a checkpoint: the positions in the data differ.

    Args:
        folder: the run folder, for the message.
        position: the checkpoint's, from `get_state` of `FeatureBatches` or of a stream of images.
        cached: whether features are cached now.

    Raises:
        UserError: they were not then, or the reverse.
    """
    were_cached = "taken" in position
    if were_cached != cached:
        how = "computed once, in one process" if were_cached else "computed by several processes"
        raise UserError(
            f"{folder} began with features that were {how}, and cannot go on with others: continue it with as many "
            "processes, or start a new run."
        )


def padded_batches(features: Features, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Cut features into full batches with `valid`; the last one is padded with zeros."""
    for first in range(0, len(features.label), batch_size):
        part = features.feature[first : first + batch_size]
        missing = batch_size - len(part)
        yield {
            "feature": np.pad(part, ((0, missing), (0, 0))),
            "label": np.pad(features.label[first : first + batch_size], (0, missing)),
            "valid": np.arange(batch_size) < len(part),
        }

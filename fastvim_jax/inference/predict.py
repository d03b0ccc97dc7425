"""Class probabilities of images: files by name, or batches of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fastvim_jax.data import Batch
from fastvim_jax.data.device_transforms import Preprocess
from fastvim_jax.data.records import printable
from fastvim_jax.errors import UserError, one_or_several
from fastvim_jax.inference.classifier import Classifier
from fastvim_jax.training.classification.evaluation import preprocess_of
from fastvim_jax.training.run_folder import Run
from fastvim_jax.training.steps import require_normalised

COLUMNS = {
    "file": "string", "rank": "int64", "class": "string", "label": "int64", "probability": "float64",
    "error": "string",
}  # fmt: skip
"""Columns of a table of predictions: name and Arrow type."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image file.

    Attributes:
        file: the file as it was named.
        labels: the most probable classes' numbers, best first; empty where the file could not be read.
        class_names: their names.
        probabilities: their probabilities, from 0 to 1.
        error: why there is no prediction, or None.
    """

    file: str
    labels: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values: `file`, and either `predictions`, best first, or `error`."""
        if self.error is not None:
            return {"file": printable(self.file), "error": self.error}
        ranked = zip(self.class_names, self.labels, self.probabilities, strict=True)
        return {
            "file": printable(self.file),
            "predictions": [
                {"class": name, "label": label, "probability": probability}
                for name, label, probability in ranked
            ],
        }

    def to_rows(self) -> list[tuple]:
        """Return a row of `COLUMNS` for each class, best first; a single row for a file that could not be read."""
        if self.error is not None:
            return [(printable(self.file), None, None, None, None, self.error)]
        ranked = zip(self.class_names, self.labels, self.probabilities, strict=True)
        return [
            (printable(self.file), rank, name, label, probability, None)
            for rank, (name, label, probability) in enumerate(ranked, start=1)
        ]


def predict_files(
    source: Run | Classifier,
    files: Sequence[str | Path] | str | Path,
    *,
    top_k: int = 5,
    batch_size: int = 32,
) -> list[Prediction]:
    """Classify image files. One that cannot be read has its `error` set; the others are classified.

    Args:
        source: a trained model, from `load_run`, or a classifier.
        files: image files of any size and kind that Pillow reads; or one.
        top_k: classes to return for each, best first; all of them if there are fewer.
        batch_size: images at a time; a classifier has its own.

    Returns:
        One prediction a file, in the order given.

    Raises:
        UserError: for a `top_k` or `batch_size` below 1, or a run that is no classifier of images.
    """
    files = one_or_several(files)
    if isinstance(source, Run):
        size = min(batch_size, max(1, len(files)))
        source = Classifier.of_run(source, batch_size=size, outputs=["probabilities"])
    return list(iter_predictions(source, files, top_k=top_k))


def iter_predictions(
    classifier: Classifier, files: Sequence[str | Path] | str | Path, *, top_k: int = 5
) -> Iterator[Prediction]:
    """Classify any number of image files, and yield each prediction as soon as its part of the files is done.

    Args:
        classifier: see `Classifier.load`.
        files: see `predict_files`.
        top_k: see `predict_files`.

    Raises:
        UserError: for a `top_k` below 1, or a classifier that does not compute probabilities.
    """
    if top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1.")
    if "probabilities" not in classifier.outputs:
        raise UserError(
            f"predictions need probabilities, and outputs={classifier.outputs!r} names none."
        )
    for file, i, result in classifier.each_file(files):
        if i in result.errors:
            yield Prediction(file, error=result.errors[i])
        else:
            yield _ranked(file, result.probabilities[i], classifier.class_names, top_k)


def predict_batches(
    model: nnx.Module, batches: Iterable[Batch]
) -> tuple[Float[np.ndarray, "n classes"], Int[np.ndarray, " n"]]:
    """Classify all valid images of a pass over the data.

    Args:
        model: a classifier.
        batches: batches of `image`, `label` and `valid`; see `evaluate`.

    Returns:
        The class probabilities and the true labels of the n valid images, in order.

    Raises:
        UserError: when there is no valid image.
    """
    probabilities_of = _make_classifier(model, preprocess_of(batches))
    probabilities, labels = [], []
    for batch in batches:
        valid = np.asarray(batch["valid"])
        probabilities.append(np.asarray(probabilities_of(batch["image"]))[valid])
        labels.append(np.asarray(batch["label"])[valid])
    if not sum(map(len, labels)):
        raise UserError("There is no valid image to classify: check data.eval_split and data.path.")
    return np.concatenate(probabilities), np.concatenate(labels)


def _make_classifier(
    model: nnx.Module, preprocess: Preprocess | None
) -> Callable[[np.ndarray], Array]:
    """Build the jitted map from images `b h w c` to probabilities `b classes`, float32 or wider."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def classify(params: Any, images: Array) -> Array:
        images = images if preprocess is None else preprocess(images)
        logits = nnx.merge(graphdef, params)(require_normalised(images))
        return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))

    return lambda images: classify(params, images)


def _ranked(
    file: str, probabilities: np.ndarray, class_names: Sequence[str], top_k: int
) -> Prediction:
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return Prediction(
        file,
        tuple(int(i) for i in best),
        tuple(class_names[i] if class_names else str(i) for i in best),
        tuple(float(probabilities[i]) for i in best),
    )

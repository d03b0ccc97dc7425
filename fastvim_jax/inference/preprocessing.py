"""Say how a run's images become the model's input, in the form in which saved models keep it."""

from __future__ import annotations

from typing import Any, Literal

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.models.pretrained import Preprocessing, default_preprocessing
from fastvim_jax.training.run_folder import Run


def preprocessing_of(run: Run) -> Preprocessing:
    """Return how a run's images become the model's input in its evaluation."""
    config: Any = run.config
    data = config.data.resolved() if isinstance(config.data, CellsData) else config.data
    names = data.names if isinstance(data, CellsData) else ()
    crop = getattr(data, "eval_crop", None) or 1.0
    size = config.model.image_size
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if not data.mean:
        return default_preprocessing(config.model)
    normalise_pixels = getattr(config, "normalise_pixels", True)
    return Preprocessing(
        pair, crop, tuple(data.mean), tuple(data.std), tuple(names), normalise_pixels
    )


def photographs_data(preprocessing: Preprocessing, channels: Literal[1, 3]) -> ClassificationData:
    """Return the data config of a saved model of photographs; its source is never read."""
    return ClassificationData(
        source="digits",
        image_size=preprocessing.image_size,
        channels=channels,
        mean=preprocessing.mean,
        std=preprocessing.std,
        eval_crop=preprocessing.crop,
    )

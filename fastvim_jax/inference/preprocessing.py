"""Convert between a run's data config and the preprocessing that a saved model keeps."""

from __future__ import annotations

from typing import Any, Literal

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.models.saving import Preprocessing, default_preprocessing
from fastvim_jax.training.run_folder import Run


def preprocessing_of(run: Run) -> Preprocessing:
    """Return the preprocessing of a run's evaluation: how images become the model's input."""
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
    """Return a data config that preprocesses photographs as a saved model needs. Nothing reads its source."""
    return ClassificationData(
        source="digits",
        image_size=preprocessing.image_size,
        channels=channels,
        mean=preprocessing.mean,
        std=preprocessing.std,
        eval_crop=preprocessing.crop,
    )

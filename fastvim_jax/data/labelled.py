"""Choose the pipeline of labelled images by the config: pictures (`classification`) or any channels (`cells`).

The functions that preprocess and augment a batch inside the jitted step are chosen here, too, so that a trainer need
not know which data it has.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jax.sharding import Mesh

from fastvim_jax.data import cells_device, device_transforms
from fastvim_jax.data.batches import BatchIterator
from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.config import DataConfig
from fastvim_jax.data.device_transforms import Augment, Preprocess
from fastvim_jax.errors import UserError

LabelledData = ClassificationData | CellsData


def make_train_iterator(
    config: DataConfig, *, seed: int, mesh: Mesh | None = None, **share: Any
) -> BatchIterator:
    """Return an endless iterator over training batches; see `make_train_iterator` of the config's own pipeline."""
    if isinstance(config, ClassificationData):
        share["mesh"] = mesh
    return _pipeline(config).make_train_iterator(config, seed=seed, **share)


def make_eval_iterator(config: DataConfig, **options: Any) -> BatchIterator:
    """Return an iterator over one pass for evaluation; see `make_eval_iterator` of the config's own pipeline."""
    return _pipeline(config).make_eval_iterator(config, **options)


def load_image(file: str | Path, config: DataConfig) -> np.ndarray:
    """Read one image file the way evaluation does: uint8 `h w c`.

    Raises:
        DecodeError: when the file cannot be read or is no image.
        UserError: when `config` is neither a ClassificationData nor a CellsData.
    """
    return _pipeline(config).load_image(file, config)


def make_preprocess(config: DataConfig) -> Preprocess | cells_device.ChannelPreprocess:
    """Return the map from uint8 images `b h w c` to the model's input; see the config's own `make_preprocess`."""
    if isinstance(config, CellsData):
        return cells_device.make_preprocess(config)
    return device_transforms.make_preprocess(config)


def make_augment(config: DataConfig, num_classes: int, *, label_smoothing: float = 0.0) -> Augment:
    """Return the map `augment(key, batch) -> batch` of a training batch; see the config's own `make_augment`."""
    config = _labelled(config)
    if isinstance(config, CellsData):
        return cells_device.make_augment(config)
    return device_transforms.make_augment(config, num_classes, label_smoothing=label_smoothing)


def _labelled(config: DataConfig) -> LabelledData:
    """Return the config, once it is one of labelled images."""
    if isinstance(config, LabelledData):
        return config
    kind = type(config).__name__
    raise UserError(
        f"config must be a ClassificationData (pictures) or a CellsData (any channels), not {kind}."
    )


def _pipeline(config: DataConfig) -> ModuleType:
    from fastvim_jax.data import cells, classification

    return cells if isinstance(_labelled(config), CellsData) else classification

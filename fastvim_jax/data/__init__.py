"""Image data: sources, transforms and grain pipelines. Knows no model.

A file here is shared by all tasks, or is the pipeline of the one task it is named after.

The iterators load on first use: grain imports JAX, which the command line's help need not wait for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvim_jax.data.cells_config import CellsData
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from fastvim_jax.data.decode import decode_image
from fastvim_jax.data.records import DecodeError, Record, Source
from fastvim_jax.data.sources import SOURCES, open_source

if TYPE_CHECKING:
    from fastvim_jax.data.batches import Batch, BatchIterator
    from fastvim_jax.data.labelled import load_image, make_eval_iterator, make_train_iterator

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SOURCES",
    "Batch",
    "BatchIterator",
    "CellsData",
    "ClassificationData",
    "DataConfig",
    "DecodeError",
    "Record",
    "Source",
    "decode_image",
    "load_image",
    "make_eval_iterator",
    "make_train_iterator",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "batches" if name in ("Batch", "BatchIterator") else "labelled"
        return getattr(importlib.import_module(f"fastvim_jax.data.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

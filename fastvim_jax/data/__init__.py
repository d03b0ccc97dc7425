"""Read images and make batches of them: sources, transforms and grain pipelines. This package knows no model.

Read in this order:

    1. records, sources      what a record is, and where records come from (`sources.image_folder` is an example)
    2. decode, transforms    from the bytes of a file to the pixels of an image
    3. classification        the pipeline of one task; `cells`, `segmentation` and `detection` are those of the others
    4. batches, stream       the batches that every pipeline yields, and reading ahead
    5. device_transforms     normalisation and augmentation inside the compiled step
    6. resident, prefetch    data sets kept in device memory; batches moved to the devices

`prepare` holds what `fastvim data check` and `fastvim data prepare` do. The iterators are imported on first use,
because they import grain and JAX, and the command line's help must not wait for these.
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

"""Where records come from: one small class per kind of data set, all following `records.Source`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastvim_jax.data.records import Source
from fastvim_jax.data.sources.array_record import ArrayRecordSource
from fastvim_jax.data.sources.digits import DigitsSource
from fastvim_jax.data.sources.hugging_face import open_hugging_face
from fastvim_jax.data.sources.image_folder import ImageFolderSource
from fastvim_jax.data.sources.packed_npz import PackedNpzSource
from fastvim_jax.data.sources.part import SourcePart, split_and_part
from fastvim_jax.data.sources.tfds import TfdsSource
from fastvim_jax.data.sources.webdataset import WebDatasetSource
from fastvim_jax.errors import UserError, suggest

SOURCES: tuple[str, ...] = (
    "digits",
    "packed_npz",
    "image_folder",
    "webdataset",
    "array_record",
    "hugging_face",
    "tfds",
)


def open_source(
    name: str, split: str, *, path: str = "", class_list: str = "", any_label: bool = False
) -> Source:
    """Open one split of a data set.

    Args:
        name: one of `SOURCES`.
        split: the split's name: a file's or sub-folder's stem; a slice behind it takes a part: `train[5000:]`.
        path: the data set's folder, `~` and environment variables expanded; for tfds a set's name will do.
        class_list: class list to use instead of the folder's own.
        any_label: let labels outside the classes pass, for a scan that lists them.

    Raises:
        UserError: for an unknown source or split, a missing folder, or a folder without images.
    """
    whole, part = split_and_part(split)
    if part is not None:
        source = open_source(name, whole, path=path, class_list=class_list, any_label=any_label)
        return SourcePart(source, part, split)
    if name == "digits":
        return DigitsSource(split)
    if name not in SOURCES:
        raise UserError(
            f"Unknown data source {name!r}: use one of {', '.join(SOURCES)}."
            + suggest(name, SOURCES)
        )
    root = expand_path(path)
    classes = expand_path(class_list) if class_list else None
    if name == "tfds":
        return TfdsSource(str(root), split, class_list=classes, any_label=any_label)
    if not root.is_dir():
        raise UserError(f"The data folder {str(root)!r} does not exist (data.path).")
    if name == "image_folder":
        return ImageFolderSource(root, split, class_list=classes)
    kinds: dict[str, Callable[..., Source]] = {
        "packed_npz": PackedNpzSource,
        "webdataset": WebDatasetSource,
        "array_record": ArrayRecordSource,
        "hugging_face": open_hugging_face,
    }
    return kinds[name](root, split, class_list=classes, any_label=any_label)


def expand_path(path: str) -> Path:
    """Expand `~` and environment variables; an unset variable is an error naming it."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    if "$" in expanded:
        raise UserError(f"The path {path!r} uses an environment variable that is not set.")
    return Path(expanded)

"""Where records come from: one small class per kind of data set, all following `records.Source`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastvim_jax.data.records import Source
from fastvim_jax.data.sources.digits import DigitsSource
from fastvim_jax.data.sources.image_folder import ImageFolderSource
from fastvim_jax.data.sources.packed_npz import PackedNpzSource
from fastvim_jax.data.sources.part import SourcePart, split_and_part
from fastvim_jax.data.sources.webdataset import WebDatasetSource
from fastvim_jax.errors import UserError, suggest

SOURCES: tuple[str, ...] = ("digits", "packed_npz", "image_folder", "webdataset")


def open_source(name: str, split: str, *, path: str = "", class_list: str = "") -> Source:
    """Open one split of a data set.

    Args:
        name: one of `SOURCES`.
        split: the split's name: a file's or sub-folder's stem; a slice behind it takes a part: `train[5000:]`.
        path: the data set's folder, `~` and environment variables expanded.
        class_list: class list to use instead of the folder's own.

    Raises:
        UserError: for an unknown source or split, a missing folder, or a folder without images.
    """
    whole, part = split_and_part(split)
    if part is not None:
        return SourcePart(open_source(name, whole, path=path, class_list=class_list), part, split)
    if name == "digits":
        return DigitsSource(split)
    if name not in SOURCES:
        raise UserError(
            f"Unknown data source {name!r}: use one of {', '.join(SOURCES)}."
            + suggest(name, SOURCES)
        )
    root = expand_path(path)
    if not root.is_dir():
        raise UserError(f"The data folder {str(root)!r} does not exist (data.path).")
    classes = expand_path(class_list) if class_list else None
    kinds: dict[str, Callable[..., Source]] = {
        "packed_npz": PackedNpzSource,
        "image_folder": ImageFolderSource,
        "webdataset": WebDatasetSource,
    }
    return kinds[name](root, split, class_list=classes)


def expand_path(path: str) -> Path:
    """Expand `~` and environment variables; an unset variable is an error naming it."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    if "$" in expanded:
        raise UserError(f"The path {path!r} uses an environment variable that is not set.")
    return Path(expanded)

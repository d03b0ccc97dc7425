"""Open data sets: one small class per kind of data set, all of which follow `records.Source`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastvim_jax.data.records import Source, printable
from fastvim_jax.data.sources.array_record import ArrayRecordSource
from fastvim_jax.data.sources.channel_files import ChannelFilesSource, split_pattern
from fastvim_jax.data.sources.digits import DigitsSource
from fastvim_jax.data.sources.hugging_face import open_hugging_face
from fastvim_jax.data.sources.image_folder import ImageFolderSource
from fastvim_jax.data.sources.jump_cp import JumpCpSource
from fastvim_jax.data.sources.packed_npz import PackedNpzSource
from fastvim_jax.data.sources.part import SourcePart, split_and_part
from fastvim_jax.data.sources.pixels import PixelsSource
from fastvim_jax.data.sources.tfds import TfdsSource
from fastvim_jax.data.sources.webdataset import WebDatasetSource
from fastvim_jax.errors import UserError, require_texts, suggest

SOURCES: tuple[str, ...] = (
    "digits",
    "packed_npz",
    "image_folder",
    "webdataset",
    "array_record",
    "pixels",
    "hugging_face",
    "tfds",
    "jump_cp",
    "channel_files",
)


def open_source(
    name: str,
    split: str,
    *,
    path: str = "",
    class_list: str = "",
    any_label: bool = False,
    follow_links: bool = False,
    channels: Sequence[str] = (),
) -> Source:
    """Open one split of a data set.

    Args:
        name: one of `SOURCES`.
        split: the split's name: a file's or sub-folder's stem; a slice behind it takes a part: `train[5000:]`.
        path: the data set's folder, `~` and environment variables expanded; for tfds a set's name will do; for
            channel_files a naming pattern (`ChannelFilesSource`).
        class_list: class list to use instead of the folder's own.
        any_label: let labels outside the classes pass, for a scan that lists them.
        follow_links: read what links point to outside the data set's folder.
        channels: names of the channels to read of jump_cp or channel_files, in order; (): all that are found, of
            channel_files by name.

    Raises:
        UserError: for an unknown source or split, a missing folder, a folder without images, or files that are damaged
            or not of the source's kind.
    """
    whole, part = split_and_part(split)
    channels = require_texts(channels, "channels")
    options: Any = {
        "path": path,
        "class_list": class_list,
        "any_label": any_label,
        "follow_links": follow_links,
        "channels": channels,
    }
    if part is not None:
        return SourcePart(open_source(name, whole, **options), part, split)
    if name == "digits":
        return DigitsSource(split)
    if name not in SOURCES:
        raise UserError(
            f"Unknown data source {name!r}: use one of {', '.join(SOURCES)}."
            + suggest(name, SOURCES)
        )
    if name == "jump_cp":
        url = path if "://" in path else str(expand_path(path))
        tables = expand_path(class_list) if class_list else None
        with _errors_of(name, split, url):
            return JumpCpSource(url, split, tables=tables, channels=channels)
    folder, pattern = split_pattern(path) if name == "channel_files" else (path, "")
    root = expand_path(folder)
    classes = expand_path(class_list) if class_list else None
    if name != "tfds" and not root.is_dir():
        raise UserError(f"The data folder {str(root)!r} does not exist (data.path).")
    kinds: dict[str, Callable[[], Source]] = {
        "tfds": lambda: TfdsSource(str(root), split, class_list=classes, any_label=any_label),
        "image_folder": lambda: ImageFolderSource(
            root, split, class_list=classes, follow_links=follow_links
        ),
        "packed_npz": lambda: PackedNpzSource(root, split, class_list=classes, any_label=any_label),
        "webdataset": lambda: WebDatasetSource(
            root, split, class_list=classes, any_label=any_label
        ),
        "array_record": lambda: ArrayRecordSource(
            root, split, class_list=classes, any_label=any_label
        ),
        "pixels": lambda: PixelsSource(root, split, class_list=classes, any_label=any_label),
        "channel_files": lambda: ChannelFilesSource(
            root,
            pattern,
            split,
            channels=channels,
            class_list=classes,
            follow_links=follow_links,
        ),
        "hugging_face": lambda: open_hugging_face(
            root, split, class_list=classes, any_label=any_label, follow_links=follow_links
        ),
    }
    with _errors_of(name, split, str(root)):
        source = kinds[name]()
        if getattr(source, "counts_classes", False) and split != "train":
            _take_classes_of_train(source, len(source.class_names), name, options)
    return source


@contextlib.contextmanager
def _errors_of(name: str, split: str, place: str) -> Iterator[None]:
    """Name the data set in any error: damaged files, or files of another kind, make their readers raise anything."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        raise UserError(
            f"The split {split!r} in {printable(place)!r} cannot be read as {name} ({type(error).__name__}: "
            f"{printable(str(error))}). Name the right kind of data set with data.source, or mend the files."
        ) from error


def _take_classes_of_train(source: Any, count: int, name: str, options: dict[str, Any]) -> None:
    """Give a split whose classes are only counted those of train: it may lack the highest."""
    try:
        train = open_source(name, "train", **{**options, "any_label": True})
    except UserError:  # There is none, or it is damaged, as whoever trains on it is told.
        return
    if len(train.class_names) > count:
        source.class_names = train.class_names


def data_folder(path: str) -> Path:
    """Return the folder of a data set, expanded: of a naming pattern, the part before its first field."""
    return expand_path(split_pattern(path)[0])


def expand_path(path: str) -> Path:
    """Expand `~` and environment variables; an unset variable is an error naming it."""
    expanded = os.path.expandvars(os.path.expanduser(path))
    if "$" in expanded:
        raise UserError(f"The path {path!r} uses an environment variable that is not set.")
    return Path(expanded)

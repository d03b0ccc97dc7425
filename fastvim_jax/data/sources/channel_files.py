"""Images of one file per channel, found by a naming pattern.

An example is `fields/{split}/{class}/{well}_s{site}_{channel}.tif`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.listing import SharedArray, Texts
from fastvim_jax.data.multichannel import (
    find_channel_files,
    read_channel_files,
    to_uint8,
    unmatched_files,
)
from fastvim_jax.data.records import DecodeError, Record, printable
from fastvim_jax.data.sources.class_lists import ClassList, folder_labels, read_class_list
from fastvim_jax.data.sources.image_folder import EXTENSIONS
from fastvim_jax.errors import UserError, counted

Key = tuple[tuple[str, str], ...]


class ChannelFilesSource:
    """One split of a folder that holds one file for each image and channel.

    Records hold pixels uint8 `h w c`. Classes are those of the class list, or what `{class}` is in the split `train`,
    sorted. An image that lacks a channel stays in the listing, and reading it says what is missing.

    Args:
        root: the data set's folder.
        pattern: a path below it. `{channel}`, `{class}` and `{split}` stand for the names of those, all other fields
            together name the image (`find_channel_files`). Without `{split}` the only split is "all".
        split: what `{split}` is.
        channels: the channels wanted, in this order; (): all that are found, by name.
        class_list: file with the classes.
        follow_links: read what links point to outside the root.

    Attributes:
        channel_names: the channels' names, in the order of the pixels.
        notes: one line that counts the image files below the folder that the pattern does not match, if there are any.

    Raises:
        UserError: the pattern lacks a field, or no file matches it, or a class or channel is unknown.
    """

    def __init__(
        self,
        root: Path,
        pattern: str,
        split: str,
        *,
        channels: Sequence[str] = (),
        class_list: Path | None = None,
        follow_links: bool = False,
    ) -> None:
        if "{class}" not in pattern:
            raise UserError(
                f"{pattern!r} has no {{class}}: say where a file's path holds its class."
            )
        if "{split}" not in pattern and split != "all":
            raise UserError(
                f"{pattern!r} has no {{split}}, so the only split is 'all', not {split!r}. A slice takes a part of "
                "it: all[1000:]."
            )
        found = _find(root, pattern, split, channels, follow_links)
        classes = (
            read_class_list(class_list)
            if class_list
            else _classes(root, pattern, found, follow_links)
        )
        label_of = folder_labels(classes)
        unknown = sorted({_class_of(key) for key in found} - set(label_of))
        if unknown:
            raise UserError(
                f"{pattern!r} finds {', '.join(map(printable, unknown[:5]))}, which is no known class. Classes come "
                "from the class list or from the split train."
            )
        self.class_names = tuple(map(printable, classes.names))
        self.channel_names = tuple(channels) or _channels_of(found)
        if not self.channel_names:
            raise UserError(f"{pattern!r} finds no channel.")
        self.notes = _notes(root, pattern, follow_links)
        in_order = (image.get(name) for image in found.values() for name in self.channel_names)
        files = ["" if file is None else os.path.relpath(file, root) for file in in_order]
        self._root, self._files = root, Texts(files)
        self._labels = SharedArray(np.asarray([label_of[_class_of(key)] for key in found]))

    @property
    def labels(self) -> np.ndarray:
        """Every record's label, known without reading an image."""
        return self._labels.values

    def __len__(self) -> int:
        return len(self._labels.values)

    def __getitem__(self, index: int) -> Record:
        files = self._channel_files(index)
        name = printable(next(file for file in files.values() if file))
        missing = [channel for channel, file in files.items() if not file]
        if missing:
            raise DecodeError(f"{name}: no file of the channel {', '.join(missing)} beside it.")
        image = read_channel_files({channel: self._root / file for channel, file in files.items()})
        return Record(to_uint8(image.pixels), int(self.labels[index]), name)

    def stamp(self, index: int) -> str:
        """Return what changes with a record: its files' sizes and times, and its label (`fingerprint.Stamped`)."""
        files = self._channel_files(index).values()
        stamps = [f"{file_stamp(self._root / file)} {file}" for file in files if file]
        return " ".join([*stamps, str(self.labels[index])])

    def _channel_files(self, index: int) -> dict[str, str]:
        index = range(len(self))[index]
        count = len(self.channel_names)
        files = self._files[index * count : (index + 1) * count]
        return dict(zip(self.channel_names, files, strict=True))


def split_pattern(path: str) -> tuple[str, str]:
    """Take a path with fields in braces apart: the folder before the first field, and the pattern below it.

    A path without a field is a folder with an empty pattern.
    """
    parts = Path(path).parts
    fixed = next((i for i, part in enumerate(parts) if "{" in part), len(parts))
    return str(Path(*parts[:fixed])), "/".join(parts[fixed:])


def _find(
    root: Path, pattern: str, split: str, channels: Sequence[str], follow_links: bool
) -> dict[Key, dict[str, Path]]:
    braces = split.replace("{", "{{").replace("}", "}}")
    filled = pattern.replace("{split}", braces)
    return find_channel_files(root, filled, channels or None, follow_links=follow_links)


def _notes(root: Path, pattern: str, follow_links: bool) -> tuple[str, ...]:
    files = unmatched_files(root, pattern, follow_links=follow_links)
    images = [printable(file) for file in files if Path(file).suffix.lower() in EXTENSIONS]
    if not images:
        return ()
    shown = ", ".join(images[:3]) + (", ..." if images[3:] else "")
    what = counted(len(images), "image file does", "image files do")
    return (f"left out: {what} not match the pattern {pattern!r} ({shown}).",)


def _classes(
    root: Path, pattern: str, found: dict[Key, dict[str, Path]], follow_links: bool
) -> ClassList:
    names = {_class_of(key) for key in found}
    try:
        if "{split}" in pattern:
            names = {_class_of(key) for key in _find(root, pattern, "train", (), follow_links)}
    except UserError:  # There is no split train: the classes are the split's own.
        pass
    ordered = tuple(sorted(names))
    return ClassList(ordered, ordered)


def _class_of(key: Key) -> str:
    return dict(key)["class"]


def _channels_of(found: dict[Key, dict[str, Path]]) -> tuple[str, ...]:
    return tuple(sorted({channel for image in found.values() for channel in image}))

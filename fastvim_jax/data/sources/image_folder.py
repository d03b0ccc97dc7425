"""A tree with one folder a class: `<root>/<split>/<class>/**/image.jpg`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.records import Record
from fastvim_jax.data.sources.class_lists import ClassList, find_class_list, read_class_list
from fastvim_jax.errors import UserError, suggest

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)


class ImageFolderSource:
    """One split of a tree of class folders.

    Labels come from, in this order: the class list given, `classes.tsv` or `classes.txt` in the root, the
    sorted folders of `train`, the sorted folders of the split itself. So a split that lacks some classes
    keeps the labels of training. A class folder without images is allowed; an unknown folder is an error.
    """

    def __init__(self, root: Path, split: str, *, class_list: Path | None = None) -> None:
        self._root = root / split
        if not self._root.is_dir():
            splits = folders_in(root)
            raise UserError(
                f"{str(self._root)!r} does not exist; folders found there: {', '.join(splits) or 'none'}."
                + suggest(split, splits)
            )
        folders = folders_in(self._root)
        if class_list:
            classes = read_class_list(class_list)
        else:
            classes = find_class_list(root) or _classes_of_tree(root, folders)
        self.class_names = classes.names
        label_of = {folder: label for label, folder in enumerate(classes.folders)}
        unknown = [folder for folder in folders if folder not in label_of]
        if unknown:
            raise UserError(
                f"{str(self._root)!r} has folders that are no known class: {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''}. Classes come from the class list or from train/."
            )
        self._files: list[str] = []
        self._labels: list[int] = []
        for folder in folders:
            for file in _images(self._root / folder):
                self._files.append(os.path.relpath(file, self._root))
                self._labels.append(label_of[folder])
        if not self._files:
            raise UserError(
                f"No images in {str(self._root)!r}: expected one folder a class, with files ending in "
                f"{', '.join(sorted(EXTENSIONS))}."
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file = os.path.join(self._root, self._files[index])
        with open(file, "rb") as opened:
            return Record(opened.read(), self._labels[index], file)

    def stamp(self, index: int) -> str:
        """Return what changes with a record: its file and label (`fingerprint.Stamped`)."""
        file = self._files[index]
        return f"{file_stamp(self._root / file)} {self._labels[index]} {file}"

    def unread(self) -> list[str]:
        """Files in the split that are no record: of another extension, or beside the class folders; hidden ones not."""
        read = set(self._files)
        found = (os.path.relpath(file, self._root) for file in _files(self._root))
        return [file for file in found if file not in read and not file.startswith(".")]


def _classes_of_tree(root: Path, folders: list[str]) -> ClassList:
    names = tuple(folders_in(root / "train") if (root / "train").is_dir() else folders)
    return ClassList(names, names)


def folders_in(root: Path) -> list[str]:
    """Names of the sub-folders, sorted, hidden ones left out."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path) -> Iterator[str]:
    """Image files under a class folder, in an order that does not depend on the file system."""
    return (file for file in _files(folder) if os.path.splitext(file)[1].lower() in EXTENSIONS)


def _files(folder: Path) -> Iterator[str]:
    """Files under a folder, hidden ones left out, in an order that does not depend on the file system."""
    for directory, subfolders, files in os.walk(folder):
        subfolders.sort()
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.join(directory, name)

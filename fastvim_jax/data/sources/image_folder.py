"""Read a tree with one folder per class: `<root>/<split>/<class>/**/image.jpg`, or no splits (`<root>/<class>/...`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastvim_jax.data.files import check_link, is_folder, read_file, walk
from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.listing import SharedArray, Texts, listed
from fastvim_jax.data.records import Record, printable
from fastvim_jax.data.sources.class_lists import (
    ClassList,
    find_class_list,
    folder_labels,
    read_class_list,
)
from fastvim_jax.data.sources.manifest import SOURCES_BY_FORMAT, prepared_splits
from fastvim_jax.errors import UserError, suggest

EXTENSIONS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".npy",
    )
)


_KINDS = {".tar": "webdataset", ".parquet": "hugging_face", ".npz": "packed_npz"}
WHOLE = "."
"""The split of a folder that has none: all class folders in it."""
TRAINED = ("train", "training")
"""Names of splits to train on, the first that is there."""
HELD_OUT = ("val", "validation", "valid", "eval", "dev", "test", "testing")
"""Names of splits to evaluate on, the first that is there."""


class ImageFolderSource:
    """One split of a tree of class folders.

    Labels come from the first of these that exists: the given class list; `classes.tsv`, `.csv` or `.txt` in the root;
    the sorted folders of `train`; the sorted folders of the split itself. So a split that lacks some classes keeps the
    labels of training. A class folder may be empty. A folder that is no known class is an error. Hidden files and
    folders are skipped at every depth.

    Args:
        root: the data set's folder.
        split: name of the split's folder in it; `WHOLE` (`.`): the root's own folders are the classes.
        class_list: a file that lists the classes; see `class_lists`.
        follow_links: read files that links lead to outside the root. Otherwise such a link is an error.
    """

    def __init__(
        self, root: Path, split: str, *, class_list: Path | None = None, follow_links: bool = False
    ) -> None:
        self._split_folder = root / split
        if not self._split_folder.is_dir():
            splits = folders_in(root)
            hint = suggest(split, splits)
            if has_no_splits(root):
                hint = (
                    f" If these are the classes, there is no split: use parts of the whole folder, "
                    f"train_split='{WHOLE}[-1/10]' and eval_split='{WHOLE}[1/10]' (--data.train-split, "
                    "--data.eval-split); `fastvim data check` prints the command."
                )
            elif not splits and (kind := _other_kind(root)):
                hint = (
                    f" The folder looks like a data set of the kind {kind}: set data.source={kind}."
                )
            raise UserError(
                f"{str(self._split_folder)!r} does not exist; folders found there: {', '.join(splits) or 'none'}."
                + hint
            )
        self._root = root
        self._follow_links = follow_links
        home = os.path.realpath(root)
        check_link(str(self._split_folder), home, follow_links=follow_links)
        folders = folders_in(self._split_folder)
        if class_list:
            classes = read_class_list(class_list)
        else:
            classes = find_class_list(root) or _classes_of_tree(root, folders)
        self.class_names = tuple(map(printable, classes.names))
        label_of = folder_labels(classes)
        unknown = [printable(folder) for folder in folders if folder not in label_of]
        if unknown:
            raise UserError(
                f"{str(self._split_folder)!r} has folders that are no known class: {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''}. Classes come from the class list or from train/."
            )

        def list_images() -> dict[str, np.ndarray]:
            files: list[str] = []
            labels: list[int] = []
            for folder in folders:
                check_link(str(self._split_folder / folder), home, follow_links=follow_links)
                for file in self._images(self._split_folder / folder):
                    files.append(os.path.relpath(file, self._split_folder))
                    labels.append(label_of[folder])
            return {**Texts.pack(files), "labels": np.asarray(labels, np.int64)}

        found = listed(list_images)
        self._files, self._labels = Texts.packed(found), SharedArray(found["labels"])
        if not len(self._files):
            raise UserError(
                f"No images in {str(self._split_folder)!r}: expected one folder per class, with files ending in "
                f"{', '.join(sorted(EXTENSIONS))}."
            )

    @property
    def labels(self) -> np.ndarray:
        """Every record's label, known without reading an image."""
        return self._labels.values

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file = os.path.join(self._split_folder, self._files[index])
        return Record(read_file(file), int(self.labels[index]), printable(file))

    def stamp(self, index: int) -> str:
        """Return a string that changes whenever a record's file or label does (`fingerprint.Stamped`)."""
        file = self._files[index]
        return f"{file_stamp(self._split_folder / file)} {self.labels[index]} {file}"

    def unread(self) -> list[str]:
        """List files of the split that are not read: files of other types, or beside the class folders; none hidden."""
        read = set(self._files)
        found = walk(self._split_folder, self._root, follow_links=self._follow_links)
        names = (os.path.relpath(file, self._split_folder) for file in found)
        return [printable(name) for name in names if name not in read]

    def _images(self, folder: Path) -> Iterator[str]:
        """List image files under a class folder, in an order that does not depend on the file system."""
        found = walk(folder, self._root, follow_links=self._follow_links)
        return (file for file in found if os.path.splitext(file)[1].lower() in EXTENSIONS)


def _classes_of_tree(root: Path, folders: list[str]) -> ClassList:
    names = tuple(folders_in(root / "train") if (root / "train").is_dir() else folders)
    return ClassList(names, names)


def has_no_splits(root: Path) -> bool:
    """Tell whether the root's folders are classes: images lie in them, and none has the name of a split."""
    folders = folders_in(root)
    if any(folder.lower() in TRAINED + HELD_OUT for folder in folders):
        return False
    return any(_holds_images(root / folder) for folder in folders)


def _holds_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries if not entry.name.startswith("."))
        return any(os.path.splitext(name)[1].lower() in EXTENSIONS for name in names)


def _other_kind(root: Path) -> str:
    """Return the kind of data set that the files of a folder without sub-folders are of, "" if that does not show."""
    for kind in SOURCES_BY_FORMAT.values():
        if prepared_splits(root, kind):
            return kind
    return next((kind for ending, kind in _KINDS.items() if any(root.glob(f"*{ending}"))), "")


def folders_in(root: Path) -> list[str]:
    """List the names of the sub-folders, sorted, without hidden ones."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if is_folder(e) and not e.name.startswith("."))

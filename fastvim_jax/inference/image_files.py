"""Find the image files that a user names: files, folders, tar files, patterns and lists."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from fastvim_jax.data.files import walk
from fastvim_jax.data.sources.image_folder import EXTENSIONS
from fastvim_jax.data.tar_members import list_members
from fastvim_jax.errors import UserError, one_or_several
from fastvim_jax.regular_file import read_regular_file

SUFFIXES = tuple(sorted(EXTENSIONS))


def find_images(names: Iterable[str | Path] | str | Path) -> list[str]:
    """List image files in the given order, each one once.

    Args:
        names: each is one of

            - a file;
            - a folder: its image files and those of its sub-folders, in alphabetical order;
            - a tar file: its image files, named `shard.tar/member`;
            - a pattern of these, such as `photos/*.jpg`;
            - `@list.txt`: a file with one file, folder or tar file per line.

    Raises:
        UserError: a folder, a tar file or a list holds no images, a tar file or a list cannot be read, a name is empty,
            or nothing matches a pattern. A missing file is listed: the caller reports it when it reads the file.
    """
    found: dict[str, None] = {}
    for name in map(str, one_or_several(names)):
        found.update(dict.fromkeys(_expand(name)))
    return list(found)


def _expand(name: str) -> list[str]:
    if not name:  # From an unset variable of a shell; Path("") would be the current folder.
        raise UserError("the name of an image file is empty.")
    path = Path(name)
    if name.startswith("@") and not path.exists():
        if not (listed := _listed(name[1:])):
            raise UserError(f"the list of files {name[1:]} names no image file.")
        return listed
    if path.is_dir():
        if not (files := _in_folder(path)):
            tars = (
                f" For the tar files in it write '{name}/*.tar'." if any(path.glob("*.tar")) else ""
            )
            raise UserError(f"{name} holds no image file ({', '.join(SUFFIXES)}).{tars}")
        return files
    if not path.exists() and any(each in name for each in "*?["):
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f"nothing matches {name}.")
        found = [_in_folder(Path(m)) if Path(m).is_dir() else _in_tar(m) for m in matches]
        if not any(found):
            raise UserError(f"what matches {name} holds no image file ({', '.join(SUFFIXES)}).")
        return list(itertools.chain.from_iterable(found))
    return _in_tar(name)


def _in_folder(folder: Path) -> list[str]:
    """List the images of a folder and its sub-folders, linked ones too. A link to nothing is listed, to be reported."""
    found = walk(folder, folder, follow_links=True)
    images = (each for each in found if each.lower().endswith(SUFFIXES))
    return sorted(each for each in images if os.path.isfile(each) or not os.path.exists(each))


def _in_tar(name: str) -> list[str]:
    """Return the image files of a tar file, or the name itself if the file is no tar file."""
    if not name.endswith(".tar") or not Path(name).is_file():
        return [name]
    images = [member for member in list_members(name) if member.lower().endswith(SUFFIXES)]
    if not images:
        raise UserError(f"{name} holds no image file ({', '.join(SUFFIXES)}).")
    return images


def _listed(name: str) -> list[str]:
    try:
        lines = read_regular_file(name).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of files {name}: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    found = (_in_folder(Path(each)) if Path(each).is_dir() else _in_tar(each) for each in names)
    return list(itertools.chain.from_iterable(found))

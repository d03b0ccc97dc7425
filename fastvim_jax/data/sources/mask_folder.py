"""Images and their label maps in folders: `images/<split>/x.jpg` with `annotations/<split>/x.png`, or by patterns.

A pattern is a path below the data set's folder with `{split}` and `{name}`; `{name}` may span folders. Cityscapes:
`leftImg8bit/{split}/{name}_leftImg8bit.png` with `gtFine/{split}/{name}_gtFine_labelTrainIds.png`. An extension `.*`
stands for any image.
"""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image, UnidentifiedImageError

from fastvim_jax.data.decode import FORMATS, MAX_PIXELS
from fastvim_jax.data.files import check_link, read_inside, walk
from fastvim_jax.data.listing import listed, packed_texts, unpacked_texts
from fastvim_jax.data.records import DecodeError, Record, printable
from fastvim_jax.data.sources.class_lists import (
    find_class_list,
    read_class_list,
    read_list_text,
)
from fastvim_jax.data.sources.image_folder import EXTENSIONS
from fastvim_jax.errors import UserError, counted

IMAGE_PATTERN = "images/{split}/{name}.jpg"
MASK_PATTERN = "annotations/{split}/{name}.png"
_ADE20K_CLASSES = "objectInfo150.csv"
_SHOWN = 3  # images without a mask that an error message names


class MaskFolderSource:
    """One split of a folder of images and label maps.

    Records hold the files' bytes: the image, and as `target` the mask (None where it is missing and allowed to be).

    Args:
        root: the data set's folder.
        split: what `{split}` stands for.
        image_pattern: where images lie; see the module.
        mask_pattern: where the mask of an image lies.
        class_names: one name per class.
        allow_missing: accept images without a mask, for `fastvim data check-masks`, which lists them.
        follow_links: read what links point to outside the root.

    Raises:
        UserError: a malformed pattern, no image, or images without a mask.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        image_pattern: str = IMAGE_PATTERN,
        mask_pattern: str = MASK_PATTERN,
        class_names: tuple[str, ...],
        allow_missing: bool = False,
        follow_links: bool = False,
    ) -> None:
        for option, pattern in (("image_pattern", image_pattern), ("mask_pattern", mask_pattern)):
            if "{name}" not in pattern:
                raise UserError(
                    f"data.{option} is {pattern!r}, but must contain {{name}}: images and masks are matched by it."
                )
        self.class_names = class_names
        self._root = root
        self._image_pattern = image_pattern.replace("{split}", split)
        self._follow_links = follow_links

        def list_pairs() -> dict[str, np.ndarray]:
            images = _find(root, split, image_pattern, follow_links)
            masks = _find(root, split, mask_pattern, follow_links) if images else {}
            names = sorted(images)
            lists = {
                "images": [images[name] for name in names],
                "masks": [masks.get(name, "") for name in names],
                "stray": [masks[name] for name in sorted(masks) if name not in images],
            }
            return packed_texts(lists)

        found = unpacked_texts(listed(list_pairs))
        self._images, self._masks, self._stray = found["images"], found["masks"], found["stray"]
        if not len(self._images):
            where = root / image_pattern.replace("{split}", split)
            raise UserError(
                f"no image matches {str(where)!r}: check data.path, the split's name and data.image_pattern."
            )
        pairs = zip(self._images, self._masks, strict=True)
        self.missing = tuple(image for image, mask in pairs if not mask)
        if self.missing and not allow_missing:
            expected = mask_pattern.replace("{split}", split)
            shown = ", ".join(self.missing[:_SHOWN]) + (" ..." if self.missing[_SHOWN:] else "")
            raise UserError(
                f"of {counted(len(self), 'image')} in {str(root)!r} {len(self.missing)} "
                f"{'lacks' if len(self.missing) == 1 else 'lack'} a mask at {expected!r}: {shown}. "
                "Add the masks, remove the images, or correct data.mask_pattern."
            )

    def __len__(self) -> int:
        return len(self._images)

    @property
    def stray(self) -> tuple[str, ...]:
        """Masks without an image."""
        return tuple(self._stray)

    @property
    def notes(self) -> tuple[str, ...]:
        """One line about masks without an image, if there are any: images may have another ending than the pattern."""
        if not len(self._stray):
            return ()
        return (
            f"{counted(len(self._stray), 'mask has', 'masks have')} no image at {self._image_pattern!r}, such as "
            f"{printable(self._stray[0])}: they are not used. If images are of several types, end data.image_pattern "
            "in {name}.*, which finds all.",
        )

    def __getitem__(self, index: int) -> Record:
        image, mask = self._images[index], self._masks[index]
        target = self._read(mask) if mask else None
        return Record(self._read(image), target, self.image_name(index))

    def _read(self, path: str) -> bytes:
        return read_inside(self._root, path, follow_links=self._follow_links)

    def image_name(self, index: int) -> str:
        """Return the path of a record's image without reading it."""
        return printable(str(self._root / self._images[index]))

    def mask_name(self, index: int) -> str:
        """Return the path of a record's mask, for messages."""
        mask = self._masks[index]
        return str(self._root / mask) if mask else "no mask"


def segmentation_classes(root: Path, class_list: Path | None, count: int) -> tuple[str, ...]:
    """Return the names of the classes.

    They come from the class list given, else from `classes.txt`, `classes.tsv` or ADE20K's `objectInfo150.csv` in
    `root`, else they are numbered up to `count`.

    Raises:
        UserError: a list that cannot be read, or neither a list nor a count.
    """
    if class_list is not None and class_list.suffix != ".csv":
        return read_class_list(class_list).names
    table = root / _ADE20K_CLASSES if class_list is None else class_list
    if table.is_file():
        rows = _rows(table)
        if not rows or "Name" not in rows[0]:
            raise UserError(f"the class list {str(table)!r} needs a header with the column Name.")
        names = tuple((row["Name"] or "").split(";")[0].strip() for row in rows)
        if not all(names):
            raise UserError(
                f"the class list {str(table)!r}: row {names.index('') + 1} has no name in the column Name."
            )
        return names
    if class_list is not None:
        raise UserError(f"The class list {str(class_list)!r} does not exist.")
    found = find_class_list(root)
    if found is not None:
        return found.names
    if count < 1:
        raise UserError(
            f"{str(root)!r} has no class list: put classes.txt (one name per line) there, name one in data.class_list, "
            "or set data.classes to the number of classes."
        )
    return tuple(f"class {i}" for i in range(count))


def counts_from_one(root: Path, class_list: Path | None) -> bool:
    """Return whether the class list is a table like ADE20K's, whose column Idx numbers the first class 1."""
    table = root / _ADE20K_CLASSES if class_list is None else class_list
    if table.suffix != ".csv" or not table.is_file():
        return False
    return any((row.get("Idx") or "").strip() == "1" for row in _rows(table)[:1])


def _rows(table: Path) -> list[dict[str, str | None]]:
    """Read a table with a header.

    Raises:
        UserError: it is no text or no table.
    """
    try:
        return list(csv.DictReader(read_list_text(table).splitlines()))
    except csv.Error as error:
        raise UserError(
            f"the class list {str(table)!r} cannot be read as a table: {error}."
        ) from None


def read_mask(data: bytes, *, name: str) -> Int[np.ndarray, "h w"]:
    """Decode a label map: 8-bit grey, palette index, 1-bit or 16-bit PNG; RGB if its channels are equal.

    Raises:
        DecodeError: no image, colours instead of class numbers, or a lossy format; the message has the fix.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels")
        opened.load()
    except UnidentifiedImageError:
        what = "not an image, or of a kind that is not read" if data else "the file is empty"
        raise DecodeError(f"{name}: the mask cannot be read ({what}).") from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise DecodeError(
            f"{name}: the mask cannot be read ({error or type(error).__name__})."
        ) from None
    # A lossless WebP has a chunk of this name.
    if opened.format == "JPEG" or (opened.format == "WEBP" and b"VP8L" not in data):
        kind = "JPEG" if opened.format == "JPEG" else "lossy WebP"
        raise DecodeError(
            f"{name}: a {kind} mask has changed labels at every edge; save it as PNG."
        )
    if opened.mode == "F":
        raise DecodeError(
            f"{name}: a mask of floating-point numbers; save class numbers as 8 bits."
        )
    labels = np.asarray(opened)
    if labels.ndim == 3:
        colours = labels[..., :3] if opened.mode in ("RGB", "RGBA") else labels[..., :1]
        if (colours != colours[..., :1]).any():
            count = len(np.unique(colours.reshape(-1, colours.shape[-1]), axis=0))
            raise DecodeError(
                f"{name}: a mask of {count} colours instead of class numbers (mode {opened.mode}); convert it with the "
                "data set's palette to an 8-bit PNG whose pixels are class numbers."
            )
        labels = colours[..., 0]
    return labels.astype(np.int32)


def _find(root: Path, split: str, pattern: str, follow_links: bool) -> dict[str, str]:
    """Find the paths below `root` that match a pattern. The keys are the texts that `{name}` stands for.

    Raises:
        UserError: a link leads out of `root`, and `follow_links` is not set.
    """
    filled = pattern.replace("{split}", split)
    head, _, tail = filled.partition("{name}")
    start = head.rpartition("/")[0]
    any_image = tail.endswith(".*")
    ending = re.escape(tail.removesuffix(".*")) + (r"\.[^.]+" if any_image else "")
    matcher = re.compile(re.escape(head) + "(.+?)" + ending)
    found: dict[str, str] = {}
    if not (root / start).is_dir():
        return found
    check_link(str(root / start), os.path.realpath(root), follow_links=follow_links)
    for file in walk(root / start, root, follow_links=follow_links):
        path = os.path.relpath(file, root).replace(os.sep, "/")
        match = matcher.fullmatch(path)
        if match is None:
            continue
        if any_image and os.path.splitext(path)[1].lower() not in EXTENSIONS:
            continue
        name = match.group(1)
        if name in found:
            raise UserError(
                f"{printable(found[name])} and {printable(path)} both match {pattern!r} with the name "
                f"{printable(name)!r}: move one away, or write the ending into the pattern."
            )
        found[name] = path
    return found

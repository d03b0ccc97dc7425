"""Read images with objects in COCO's format: a JSON file of images, annotations and categories beside image folders.

Objects are boxes [x, y, width, height] in pixels, with polygons or RLE masks. Annotations that cannot be trained on are
left out and counted in `CocoSource.problems`. Category ids may have gaps; labels number the categories from 0 in the
order of their ids.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from fastvim_jax.data.files import read_inside
from fastvim_jax.data.listing import SharedArray, listed, unpacked_texts
from fastvim_jax.data.records import DecodeError, Record, printable
from fastvim_jax.data.sources.coco_file import (
    FATAL,
    WITHOUT_MASK,
    Objects,
    examine,
    pack_records,
    read_json,
)
from fastvim_jax.errors import UserError, counted

ANNOTATIONS = "annotations/instances_{split}.json"
IMAGES = "{split}"
_SHOWN = 3


class CocoSource:
    """One split of a data set in COCO's format; records hold a file's bytes and its `Objects`.

    Args:
        root: the data set's folder.
        split: what `{split}` stands for in the patterns.
        annotations: the JSON file below `root`.
        images: the folder of the images below `root`.
        training: leave out images without objects and images with a side below `least_side`.
        masks: in training, leave out objects without a mask.
        least_side: smallest side of a training image, in pixels.
        allow_missing: accept images whose file is missing, for `fastvim data check-coco`, which lists them.
        follow_links: follow links that lead out of the root.

    Attributes:
        class_names: names of the categories by label.
        category_ids: COCO's id of each label.
        problems: number of annotations or images with each kind of problem.

    Raises:
        UserError: a missing or malformed JSON file, or images without a file.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        annotations: str = ANNOTATIONS,
        images: str = IMAGES,
        training: bool = False,
        masks: bool = False,
        least_side: int = 32,
        allow_missing: bool = False,
        follow_links: bool = False,
    ) -> None:
        self.file = root / annotations.replace("{split}", split)
        self._root, self._images = root, images.replace("{split}", split)
        self._follow_links = follow_links

        def list_images() -> dict[str, np.ndarray]:
            content = read_json(self.file)
            if not training:
                self.content = content
            try:
                return pack_records(content, root / self._images, training, least_side, masks)
            except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
                raise UserError(
                    f"{str(self.file)!r}: an entry does not follow COCO's instances format ({error!r})."
                ) from None

        arrays = listed(list_images)
        texts = unpacked_texts(arrays)
        self._names, self._ids, self._shapes = texts["names"], texts["ids"], texts["shapes"]
        self._sizes, self._ends = SharedArray(arrays["sizes"]), SharedArray(arrays["ends"])
        self._boxes, self._labels = SharedArray(arrays["boxes"]), SharedArray(arrays["labels"])
        self.category_ids = tuple(arrays["category_ids"].tolist())
        self.class_names = tuple(texts["class_names"])
        counts = arrays["problem_counts"].tolist()
        self.problems = Counter({p: n for p, n in zip(texts["problems"], counts, strict=True) if n})
        self.missing = tuple(texts["missing"])
        if self.missing and not allow_missing:
            shown = ", ".join(self.missing[:_SHOWN]) + (" ..." if self.missing[_SHOWN:] else "")
            raise UserError(
                f"of {counted(len(self), 'image')} named in {str(self.file)!r} {len(self.missing)} cannot be "
                f"found in {str(root / self._images)!r}: {shown}. Add the files, or correct data.images."
            )
        if not len(self) and self.problems[WITHOUT_MASK]:
            raise UserError(
                f"{str(self.file)!r} has no object with a mask: to train on boxes alone, set data.masks=False and "
                "model.masks=False (--data.no-masks --model.no-masks)."
            )
        if not len(self):
            raise UserError(
                f"{str(self.file)!r} has no image{' with an object to train on' if training else ''}."
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """One line about the annotations that are left out, with the reasons, if there are any."""
        if not self.problems:
            return ()
        reasons = ", ".join(f"{problem} ({n})" for problem, n in self.problems.most_common())
        return (
            f"{self.file.name}: {reasons}. What cannot be used is left out; `fastvim data check` lists it.",
        )

    @cached_property
    def content(self) -> dict[str, Any]:
        """Content of the JSON file. It is read again if another process listed the images, or for training."""
        return read_json(self.file)

    @cached_property
    def image_ids(self) -> tuple[Any, ...]:
        """COCO's id of each record."""
        return tuple(map(json.loads, self._ids))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        path = f"{self._images}/{self._names[index]}"
        data = read_inside(self._root, path, follow_links=self._follow_links)
        return Record(data, self.objects(index), printable(str(self._root / path)))

    def file_name(self, index: int) -> str:
        """Return the name of a record's image as in the JSON file."""
        return self._names[index]

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of a record's image as in the JSON file."""
        width, height = self._sizes.values[range(len(self))[index]].tolist()
        return height, width

    def objects(self, index: int) -> Objects:
        """Return a record's objects without reading its image."""
        place = range(len(self))[index]
        start, stop = self._ends.values[place : place + 2]
        width, height = self._sizes.values[place].tolist()
        shapes = tuple(json.loads(self._shapes[place]))
        boxes, labels = self._boxes.values[start:stop], self._labels.values[start:stop]
        return Objects(np.array(boxes), np.array(labels), shapes, width, height)

    def truth(self, kind: str) -> dict[str, Any]:
        """Return the ground truth for evaluation: the file's content without annotations that cannot be evaluated.

        Crowds stay. Annotations get ids from 1, because pycocotools takes an id of 0 for "no match".

        Args:
            kind: "bbox", or "segm", which leaves out objects without a mask.
        """
        sizes = {image["id"]: (image["width"], image["height"]) for image in self.content["images"]}
        kept: list[dict[str, Any]] = []
        for annotation in self.content["annotations"]:
            known = (
                annotation["category_id"] in self.category_ids and annotation["image_id"] in sizes
            )
            problem, shape = (
                examine(annotation, *sizes[annotation["image_id"]]) if known else ("", None)
            )
            if not known or problem in FATAL or (kind == "segm" and shape is None):
                continue
            area = annotation.get("area")
            stated = type(area) in (int, float) and 0 <= area < np.inf
            area = area if stated else annotation["bbox"][2] * annotation["bbox"][3]
            if not stated and kind == "segm":
                width, height = sizes[annotation["image_id"]]
                area = float(draw_shape(shape, (height, width), whole=(height, width)).sum())
            filled = {
                "area": area,
                "iscrowd": int(annotation.get("iscrowd", 0)),
                "id": len(kept) + 1,
            }
            kept.append({**annotation, **filled, "segmentation": shape})
        return {**self.content, "annotations": kept}

    def __getstate__(self) -> dict[str, Any]:
        # Workers get the records, not the whole JSON file.
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("content", "image_ids")
        }


def coco_masks() -> Any:
    """Import pycocotools' mask functions.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError(
            "COCO masks need pycocotools: pip install 'fastvim-jax[detection]'."
        ) from None
    return mask


def draw_shape(
    shape: Any,
    size: tuple[int, int],
    *,
    factor: tuple[float, float] = (1.0, 1.0),
    offset: tuple[int, int] = (0, 0),
    mirrored: bool = False,
    whole: tuple[int, int],
    name: str = "mask",
) -> Bool[np.ndarray, "h w"]:
    """Draw an object's mask into a crop of the resized image.

    Polygons are moved and then drawn, so no array is larger than the crop. An RLE mask is decoded and sampled at the
    nearest pixel.

    Args:
        shape: polygons, or RLE.
        size: height and width of the crop.
        factor: width and height of the resized image divided by those of the original.
        offset: left and top of the crop in the resized image.
        mirrored: the resized image is mirrored before it is cropped.
        whole: height and width of the resized image.
        name: the record's name, for messages.

    Raises:
        DecodeError: the RLE cannot be read.
    """
    masks = coco_masks()
    height, width = size
    if not isinstance(shape, dict):
        moved = []
        for polygon in shape:
            points = np.asarray(polygon, np.float64).reshape(-1, 2) * factor
            if mirrored:
                points[:, 0] = whole[1] - points[:, 0]
            moved.append((points - offset).ravel().tolist())
        rle = masks.merge(masks.frPyObjects(moved, height, width))
        return masks.decode(rle).astype(bool)
    try:
        packed = (
            shape
            if isinstance(shape["counts"], str | bytes)
            else masks.frPyObjects(shape, *shape["size"])
        )
        full: UInt8[np.ndarray, "m n"] = masks.decode(packed)
    except Exception as error:  # pycocotools raises almost anything on damaged counts
        raise DecodeError(f"{name}: RLE that cannot be read ({error}).") from None
    # Read at the middle of each pixel; its corner would move the mask half a pixel against the image.
    rows, columns = (
        (2 * np.arange(m) + 1) * n // (2 * m) for n, m in zip(full.shape, whole, strict=True)
    )
    if mirrored:
        columns = columns[::-1]
    rows = rows[offset[1] : offset[1] + height]
    columns = columns[offset[0] : offset[0] + width]
    return full[rows[:, None], columns].astype(bool)

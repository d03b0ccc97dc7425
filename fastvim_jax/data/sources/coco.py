"""Images with objects in COCO's format: a JSON file of images, annotations and categories beside image folders.

Objects are boxes [x, y, width, height] with polygons or RLE masks. What cannot be trained on is counted, not fatal:
see `CocoSource.problems`. Category ids may have gaps; labels count the categories from 0 in the order of their ids.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from fastvim_jax.data.files import read_inside
from fastvim_jax.data.records import DecodeError, Record, printable
from fastvim_jax.errors import UserError

ANNOTATIONS = "annotations/instances_{split}.json"
IMAGES = "{split}"
_SHOWN = 3
_FEWEST_NUMBERS = 6  # of a polygon: three points


@dataclasses.dataclass(frozen=True)
class Objects:
    """The objects of one image that can be trained on; crowds are left out.

    Attributes:
        boxes: corners (x1, y1, x2, y2), clipped to the image.
        labels: classes from 0.
        shapes: of each object its polygons `[[x, y, x, y, ...], ...]`, its RLE, or None without a mask.
        width: of the image as the file says.
        height: of the image as the file says.
    """

    boxes: Float[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    shapes: tuple[Any, ...]
    width: int
    height: int


class CocoSource:
    """One split of a data set in COCO's format; records hold a file's bytes and its `Objects`.

    Args:
        root: the data set's folder.
        split: what `{split}` stands for in the patterns.
        annotations: the JSON file below `root`.
        images: the folder of the images below `root`.
        training: leave out images without objects and images with a side below `least_side`.
        least_side: pixels.
        allow_missing: accept images whose file is missing, for a scan that lists them.
        follow_links: read what links point to outside the root.

    Attributes:
        class_names: names of the categories by label.
        category_ids: COCO's id of each label.
        image_ids: COCO's id of each record.
        content: the JSON file's content, for the evaluation.
        problems: how many annotations or images have which problem, by kind.

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
        least_side: int = 32,
        allow_missing: bool = False,
        follow_links: bool = False,
    ) -> None:
        self.file = root / annotations.replace("{split}", split)
        self._root, self._images = root, images.replace("{split}", split)
        self._follow_links = follow_links
        self.content = read_json(self.file)
        categories = sorted(self.content["categories"], key=lambda c: c["id"])
        self.category_ids = tuple(int(c["id"]) for c in categories)
        self.class_names = tuple(str(c["name"]) for c in categories)
        self.problems: Counter[str] = Counter()
        found = self._objects(training, least_side)
        self._items = found
        self.image_ids = tuple(image["id"] for image, _ in found)
        folder = root / self._images
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        names = [str(image["file_name"]) for image, _ in found]
        self.missing = tuple(n for n in names if n not in present and not (folder / n).is_file())
        if self.missing and not allow_missing:
            shown = ", ".join(self.missing[:_SHOWN]) + (" ..." if self.missing[_SHOWN:] else "")
            raise UserError(
                f"{len(self.missing)} of {len(found)} images named in {str(self.file)!r} are not in "
                f"{str(folder)!r}: {shown}. Add the files, or correct data.images."
            )
        if not found:
            raise UserError(
                f"{str(self.file)!r} has no image{' with an object to train on' if training else ''}."
            )

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        image, objects = self._items[index]
        path = f"{self._images}/{image['file_name']}"
        data = read_inside(self._root, path, follow_links=self._follow_links)
        return Record(data, objects, printable(str(self._root / path)))

    def file_name(self, index: int) -> str:
        """Return the name of a record's image as the JSON file has it."""
        return str(self._items[index][0]["file_name"])

    def objects(self, index: int) -> Objects:
        """Return a record's objects without reading its image."""
        return self._items[index][1]

    def truth(self, kind: str) -> dict[str, Any]:
        """Return what detections are judged against: the file's content without what cannot be judged.

        Crowds stay. Annotations are numbered from 1, because pycocotools takes an id of 0 for no match.

        Args:
            kind: bbox, or segm, for which objects without a mask are left out.
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
            if not known or problem in _FATAL or (kind == "segm" and shape is None):
                continue
            area = annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])
            filled = {"area": area, "iscrowd": annotation.get("iscrowd", 0), "id": len(kept) + 1}
            kept.append({**annotation, **filled, "segmentation": shape})
        return {**self.content, "annotations": kept}

    def __getstate__(self) -> dict[str, Any]:
        # Workers get the records, not the whole JSON file.
        return self.__dict__ | {"content": None}

    def _objects(self, training: bool, least_side: int) -> list[tuple[dict[str, Any], Objects]]:
        by_image: dict[Any, list[dict[str, Any]]] = {
            image["id"]: [] for image in self.content["images"]
        }
        for annotation in self.content["annotations"]:
            if annotation["image_id"] in by_image:
                by_image[annotation["image_id"]].append(annotation)
            else:
                self.problems["annotations of an image that is not listed"] += 1
        found = []
        for image in self.content["images"]:
            objects = self._of_image(image, by_image[image["id"]])
            if training and not len(objects.boxes):
                self.problems["images without objects"] += 1
            elif training and min(image["width"], image["height"]) < least_side:
                self.problems[f"images with a side below {least_side}"] += 1
            else:
                found.append((image, objects))
        return found

    def _of_image(self, image: dict[str, Any], annotations: list[dict[str, Any]]) -> Objects:
        boxes, labels, shapes = [], [], []
        width, height = int(image["width"]), int(image["height"])
        for annotation in annotations:
            problem, shape = examine(annotation, width, height)
            if annotation["category_id"] not in self.category_ids:
                problem = "unknown category"
            if problem:
                self.problems[problem] += 1
            if problem in _FATAL or problem == "unknown category" or annotation.get("iscrowd"):
                continue
            x, y, w, h = annotation["bbox"]
            boxes.append(np.clip([x, y, x + w, y + h], 0, [width, height, width, height]))
            labels.append(self.category_ids.index(annotation["category_id"]))
            shapes.append(shape)
        return Objects(
            np.asarray(boxes, np.float32).reshape(-1, 4),
            np.asarray(labels, np.int32),
            tuple(shapes),
            width,
            height,
        )


_FATAL = ("box without area", "box outside the image", "box that is no [x, y, width, height]")


def examine(annotation: dict[str, Any], width: int, height: int) -> tuple[str, Any]:
    """Return what is wrong with an annotation ("" if nothing) and its mask as far as it can be used.

    Polygons of fewer than three points are dropped; an object none of whose polygons is left has no mask (None).
    """
    try:
        x, y, w, h = (float(v) for v in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        return "box that is no [x, y, width, height]", None
    if not np.isfinite([x, y, w, h]).all():
        return "box that is no [x, y, width, height]", None
    if w <= 0 or h <= 0:
        return "box without area", None
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "box outside the image", None
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        fits = shape.get("size") == [height, width]
        return ("", shape) if fits else ("mask of another size than its image", None)
    polygons = shape or []
    whole = [p for p in polygons if len(p) >= _FEWEST_NUMBERS and len(p) % 2 == 0]
    problem = "polygon of fewer than three points" if len(whole) < len(polygons) else ""
    if not problem and (x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1):
        problem = "box that leaves the image"
    return problem, whole or None


def read_json(file: Path) -> dict[str, Any]:
    """Read an annotation file and check that it has COCO's parts.

    Raises:
        UserError: no such file, no JSON, or a part is missing.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{str(file)!r}: {error.strerror or error} (data.path, data.annotations and the split's name make it)."
        ) from None
    except ValueError as error:
        raise UserError(f"{str(file)!r} is no JSON: {error}.") from None
    for part, fields in (
        ("images", ("id", "file_name", "width", "height")),
        ("annotations", ("image_id", "category_id")),
        ("categories", ("id", "name")),
    ):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(
                f"{str(file)!r} has no list {part!r}: it must be COCO's instances format."
            )
        for entry in entries:
            if lacking := [f for f in fields if f not in entry]:
                raise UserError(
                    f"{str(file)!r}: an entry of {part!r} has no {lacking[0]!r}: {str(entry)[:80]}"
                )
    return content


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

    Polygons are moved and then drawn, so nothing larger than the crop is made. An RLE mask is decoded and sampled at
    the nearest pixel.

    Args:
        shape: polygons, or RLE.
        size: height and width of the crop.
        factor: width and height of the resized image over those of the original.
        offset: left and top of the crop in the resized image.
        mirrored: the resized image is mirrored before it is cropped.
        whole: height and width of the resized image.
        name: the record, for messages.

    Raises:
        DecodeError: RLE that cannot be read.
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
    rows, columns = (np.arange(m) * n // m for n, m in zip(full.shape, whole, strict=True))
    if mirrored:
        columns = columns[::-1]
    rows = rows[offset[1] : offset[1] + height]
    columns = columns[offset[0] : offset[0] + width]
    return full[rows[:, None], columns].astype(bool)

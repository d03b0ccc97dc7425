"""Read a JSON file in COCO's format: check its images and objects, and pack them into arrays."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from fastvim_jax.data.listing import packed_texts
from fastvim_jax.data.records import printable
from fastvim_jax.errors import UserError
from fastvim_jax.json_text import parse_json

_FEWEST_NUMBERS = 6  # of a polygon: three points
_MOST_PIXELS = 2**26  # of a side; no larger image is read
_WORDS = {int: "whole number", str: "text"}
# Parts of a file, and the fields that their entries need, with the types.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": (str,), "width": (int,), "height": (int,)},
    "annotations": {"image_id": (int, str), "category_id": (int,)},
    "categories": {"id": (int,), "name": (str,)},
}
FATAL = (
    "box without area",
    "box outside the image",
    "box that is no [x, y, width, height]",
    "iscrowd that is neither 0 nor 1",
)
"""Problems of annotations that nothing can be judged or trained by."""


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


WITHOUT_MASK = "object without a mask"


def pack_records(
    content: dict[str, Any], folder: Path, training: bool, least_side: int, masks: bool
) -> dict[str, np.ndarray]:
    """Pack all that records need into arrays, which processes can share: polygons and ids as JSON.

    Args:
        content: the JSON file.
        folder: where the images are.
        training: leave out images without objects and those with a side below `least_side`.
        least_side: in pixels.
        masks: in training, leave out objects without a mask.
    """
    categories = sorted(content["categories"], key=lambda c: c["id"])
    category_ids = tuple(int(c["id"]) for c in categories)
    problems: Counter[str] = Counter()
    found = _images_with_objects(content, category_ids, problems, training, least_side, masks)
    images, objects = [image for image, _ in found], [each for _, each in found]
    names = [str(image["file_name"]) for image in images]
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    return {
        **packed_texts(
            {
                "names": names,
                "ids": [json.dumps(image["id"]) for image in images],
                "shapes": [json.dumps(each.shapes) for each in objects],
                "class_names": _distinct([printable(c["name"]) for c in categories], category_ids),
                "problems": list(problems),
                # Joined as text: names are read below the folder, absolute ones too.
                "missing": [
                    n for n in names if n not in present and not os.path.isfile(f"{folder}/{n}")
                ],
            }
        ),
        "category_ids": np.asarray(category_ids, np.int64),
        "problem_counts": np.asarray(list(problems.values()), np.int64),
        "sizes": np.asarray([(o.width, o.height) for o in objects], np.int64).reshape(-1, 2),
        "ends": np.cumsum([0, *(len(o.labels) for o in objects)], dtype=np.int64),
        "boxes": np.concatenate([np.zeros((0, 4), np.float32), *(o.boxes for o in objects)]),
        "labels": np.concatenate([np.zeros(0, np.int32), *(o.labels for o in objects)]),
    }


def _distinct(names: list[str], ids: tuple[int, ...]) -> list[str]:
    """Add its id to each name that several categories have, as in files whose first category is the others' parent."""
    while len(counts := Counter(names)) < len(names):
        names = [
            f"{name} (id {id})" if counts[name] > 1 else name
            for name, id in zip(names, ids, strict=True)
        ]
    return names


def _images_with_objects(
    content: dict[str, Any],
    category_ids: tuple[int, ...],
    problems: Counter[str],
    training: bool,
    least_side: int,
    masks: bool,
) -> list[tuple[dict[str, Any], Objects]]:
    """List the images to use with their objects, and count those that are left out in `problems`."""
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] in by_image:
            by_image[annotation["image_id"]].append(annotation)
        else:
            problems["annotations of an image that is not listed"] += 1
    found = []
    for image in content["images"]:
        wanted = by_image[image["id"]]
        objects = _objects_of(image, wanted, category_ids, problems, training and masks)
        if training and not len(objects.boxes):
            problems["images without objects"] += 1
        elif training and min(image["width"], image["height"]) < least_side:
            problems[f"images with a side below {least_side}"] += 1
        else:
            found.append((image, objects))
    return found


def _objects_of(
    image: dict[str, Any],
    annotations: list[dict[str, Any]],
    category_ids: tuple[int, ...],
    problems: Counter[str],
    need_mask: bool,
) -> Objects:
    boxes, labels, shapes = [], [], []
    width, height = int(image["width"]), int(image["height"])
    for annotation in annotations:
        problem, shape = examine(annotation, width, height)
        if annotation["category_id"] not in category_ids:
            problem = "unknown category"
        if problem:
            problems[problem] += 1
        if problem in FATAL or problem == "unknown category" or annotation.get("iscrowd"):
            continue
        if need_mask and shape is None:
            problems[WITHOUT_MASK] += not problem
            continue
        x, y, w, h = annotation["bbox"]
        boxes.append(np.clip([x, y, x + w, y + h], 0, [width, height, width, height]))
        labels.append(category_ids.index(annotation["category_id"]))
        shapes.append(shape)
    return Objects(
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(labels, np.int32),
        tuple(shapes),
        width,
        height,
    )


def examine(annotation: dict[str, Any], width: int, height: int) -> tuple[str, Any]:
    """Return what is wrong with an annotation ("" if nothing) and its mask as far as it can be used.

    Polygons of fewer than three points are dropped; an object none of whose polygons is left has no mask (None).
    """
    try:
        if not all(type(v) in (int, float) for v in annotation["bbox"]):
            return "box that is no [x, y, width, height]", None
        x, y, w, h = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return "box that is no [x, y, width, height]", None
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "iscrowd that is neither 0 nor 1", None
    if not np.isfinite([x, y, w, h]).all():
        return "box that is no [x, y, width, height]", None
    if w <= 0 or h <= 0:
        return "box without area", None
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "box outside the image", None
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        if shape.get("size") != [height, width]:
            return "mask of another size than its image", None
        return ("", shape) if _is_mask(shape, height, width) else ("mask that cannot be read", None)
    polygons = shape or []
    if not _are_polygons(polygons, height, width):
        return "mask that cannot be read", None
    whole = [p for p in polygons if len(p) >= _FEWEST_NUMBERS and len(p) % 2 == 0]
    problem = "polygon of fewer than three points" if len(whole) < len(polygons) else ""
    if not problem and (x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1):
        problem = "box that leaves the image"
    return problem, whole or None


def _are_polygons(polygons: Any, height: int, width: int) -> bool:
    """Tell whether these are lists of numbers near the image: drawing takes memory by a polygon's length."""
    if not isinstance(polygons, list) or not all(isinstance(each, list) for each in polygons):
        return False
    values = [value for each in polygons for value in each]
    if not all(type(value) in (int, float) for value in values):
        return False
    side = max(height, width)
    return all(-side <= value <= 2 * side for value in values)  # NaN is neither.


def _is_mask(shape: dict[str, Any], height: int, width: int) -> bool:
    """Tell whether the run lengths of an RLE fill the image: of others, pycocotools reads and writes too much."""
    counts = shape.get("counts")
    if isinstance(counts, str):
        lengths = _unpacked(counts)
    elif isinstance(counts, list) and all(type(each) is int for each in counts):
        lengths = np.asarray(counts, np.float64)
    else:
        return False
    return bool((lengths >= 0).all() and lengths.sum() == height * width)


def _unpacked(counts: str) -> Float[np.ndarray, " n"]:
    """Unpack an RLE's text: base-32 digits, the lowest first, of which 32 says that more follow; from the fourth number
    on, each is the difference to the last but one.

    Returns:
        The run lengths; [-1] for text that is none.
    """
    wrong = np.asarray([-1.0])
    digits = np.frombuffer(counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return wrong
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:  # More than 35 bits.
        return wrong
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    negative = digits[ends] & 16 > 0
    values = values - np.where(negative, np.int64(1) << (5 * (ends - starts + 1)), 0)
    lengths = values.astype(np.float64)
    lengths[1::2], lengths[2::2] = np.cumsum(lengths[1::2]), np.cumsum(lengths[2::2])
    return lengths


def read_json(file: Path) -> dict[str, Any]:
    """Read an annotation file and check that it has COCO's parts.

    Raises:
        UserError: no such file, no JSON, a part is missing, a field has another type, or ids come twice or are of
            two kinds.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{str(file)!r} is not a regular file.")
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{str(file)!r}: {error.strerror or error} (data.path, data.annotations and the split's name make it)."
        ) from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{str(file)!r} is no JSON: {error}.") from None
    for part, fields in _FIELDS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(
                f"{str(file)!r} has no list {part!r}: it must be COCO's instances format."
            )
        for entry in entries:
            if lacking := [f for f in fields if not isinstance(entry, dict) or f not in entry]:
                raise UserError(
                    f"{str(file)!r}: an entry of {part!r} has no {lacking[0]!r}: {str(entry)[:80]}"
                )
            if wrong := [f for f, kinds in fields.items() if type(entry[f]) not in kinds]:
                raise UserError(
                    f"{str(file)!r}: an entry of {part!r} has a {wrong[0]!r} that is no "
                    f"{' or '.join(_WORDS[kind] for kind in fields[wrong[0]])}: {str(entry)[:80]}"
                )
    for part in ("images", "categories"):
        counts = Counter(entry["id"] for entry in content[part])
        if twice := [str(id) for id, count in counts.items() if count > 1]:
            raise UserError(
                f"{str(file)!r}: several {part} have the same id, such as {twice[0][:80]}: number them anew."
            )
        if len({type(id) for id in counts}) > 1:
            raise UserError(
                f"{str(file)!r}: some {part} have numbers and some texts as ids: use one kind."
            )
    for image in content["images"]:
        if not (0 < image["width"] <= _MOST_PIXELS and 0 < image["height"] <= _MOST_PIXELS):
            raise UserError(
                f"{str(file)!r}: an entry of 'images' has an impossible size: {str(image)[:80]}"
            )
    return content

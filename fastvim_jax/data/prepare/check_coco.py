"""Scan a data set in COCO's format, and list what training would fail on or leave out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

from fastvim_jax.data.detection import load
from fastvim_jax.data.prepare.check import Problem
from fastvim_jax.data.prepare.processes import map_source
from fastvim_jax.data.prepare.shards import Progress
from fastvim_jax.data.records import DecodeError, printable
from fastvim_jax.data.sources.coco import CocoSource, draw_shape
from fastvim_jax.data.sources.coco_file import examine
from fastvim_jax.errors import counted

_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class CocoReport:
    """The findings of a scan of one split.

    Attributes:
        records: number of images.
        objects: for each category, by name, the number of objects that can be trained on.
        crowds: number of crowd regions, which training leaves out.
        empty: number of images without objects, which training leaves out.
        problems: the problems, of the kinds `missing`, `unreadable`, `unlisted image`, `unknown category`, and those of
            `examine`.
        notes: unusual properties that are no problem.
        masks: number of objects that have a mask.
    """

    records: int
    objects: dict[str, int]
    crowds: int
    empty: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    masks: int = 0


def check_coco(
    source: CocoSource, *, workers: int = 0, progress: Progress | None = None
) -> CocoReport:
    """Examine every annotation and read every image and RLE.

    Args:
        source: a source opened with `allow_missing=True`, so that a missing image does not stop the scan.
        workers: number of worker processes.
        progress: function of the number of records done and their total.
    """
    names = source.class_names
    problems = [
        Problem("missing", f"{name}: named in {source.file.name}, but there is no file.")
        for name in source.missing
    ]
    sizes = {image["id"]: (image["width"], image["height"]) for image in source.content["images"]}
    crowds = 0
    for annotation in source.content["annotations"]:
        where = f"annotation {annotation.get('id')} of image {annotation['image_id']}"
        if annotation["image_id"] not in sizes:
            problems.append(Problem("unlisted image", f"{where}: this image is not listed."))
            continue
        if annotation["category_id"] not in source.category_ids:
            text = f"{where}: category {annotation['category_id']} is not listed."
            problems.append(Problem("unknown category", text))
        kind, _ = examine(annotation, *sizes[annotation["image_id"]])
        if kind:
            problems.append(Problem(kind, f"{where}: bbox {annotation.get('bbox')}."))
        crowds += bool(annotation.get("iscrowd"))
    missing = set(source.missing)
    parts = [range(len(source))[i : i + _CHUNK] for i in range(0, len(source), _CHUNK)]
    counts: Counter[int] = Counter()
    empty = done = masks = 0
    for _, scanned in map_source(partial(_scan, missing=missing), source, parts, workers=workers):
        for index, error in scanned:
            done += 1
            objects = source.objects(index)
            labels = objects.labels
            masks += sum(shape is not None for shape in objects.shapes)
            counts.update(int(label) for label in labels)
            empty += not len(labels)
            if error:
                problems.append(Problem("unreadable", error, index))
        if progress:
            progress(done, len(source))
    if not counts.total():
        problems.append(Problem("no object", f"{source.file.name} has no object to train on."))
    notes = _notes(source, [name for label, name in enumerate(names) if not counts[label]])
    if lacking := counts.total() - masks:
        has = counted(lacking, "object has", "objects have")
        notes.append(
            f"{has} no mask, of {counts.total()}. Masks are trained without them; boxes alone, with all objects, if "
            "data.masks and model.masks are False."
        )
    return CocoReport(
        len(source),
        {name: counts[label] for label, name in enumerate(names)},
        crowds,
        empty,
        tuple(sorted(problems, key=lambda p: (p.kind, p.index or 0))),
        tuple(notes),
        masks,
    )


def _scan(source: CocoSource, indices: range, *, missing: set[str]) -> list[tuple[int, str]]:
    found = []
    for index in indices:
        error = ""
        if source.file_name(index) not in missing:
            try:
                _, objects = load(source, index)
                size = objects.height, objects.width
                for shape in objects.shapes:
                    if isinstance(shape, dict):
                        draw_shape(shape, size, whole=size, name=f"record {index}")
            except DecodeError as failure:
                error = str(failure)
        found.append((index, error))
    return found


def _notes(source: CocoSource, unused: list[str]) -> list[str]:
    notes = []
    ids = source.category_ids
    if ids and ids != tuple(range(ids[0], ids[0] + len(ids))):
        gaps = ids[-1] - ids[0] + 1 - len(ids)
        notes.append(
            f"category ids run from {ids[0]} to {ids[-1]} with {counted(gaps, 'gap')}: labels count the {len(ids)} "
            "listed ones from 0."
        )
    counts = Counter(category["name"] for category in source.content["categories"])
    if several := [f"{printable(name)} ({count})" for name, count in counts.items() if count > 1]:
        shown = ", ".join(several[:5]) + (" ..." if several[5:] else "")
        has = counted(len(several), "name stands", "names stand")
        notes.append(f"{has} for several categories, which are told apart by their ids: {shown}.")
    if unused:
        shown = ", ".join(unused[:5]) + (" ..." if unused[5:] else "")
        has = counted(len(unused), "category has", "categories have")
        notes.append(f"{has} no object, of {len(ids)}: {shown}.")
    return notes

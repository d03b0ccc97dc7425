"""Evaluation of detectors: AP of boxes and masks by pycocotools, and pictures of some images.

All processes share the images and then hold all detections, so that they compute the same scores.
"""

from __future__ import annotations

import contextlib
import csv
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fastvim_jax.analysis.detections import draw_objects
from fastvim_jax.analysis.headline import Headline
from fastvim_jax.analysis.overlays import picture_grid
from fastvim_jax.data.batches import BatchIterator
from fastvim_jax.data.detection import load
from fastvim_jax.data.device_transforms import Preprocess
from fastvim_jax.data.prefetch import place_ahead
from fastvim_jax.data.sources.coco import CocoSource, coco_masks
from fastvim_jax.distributed import is_first_process, on_every_device
from fastvim_jax.errors import UserError, counted
from fastvim_jax.models.detection.cascade import Detections
from fastvim_jax.models.detection.masks import paste_masks
from fastvim_jax.models.detection.positions import crop_positions
from fastvim_jax.training.corrupt import count_corrupt
from fastvim_jax.training.detection.metrics import (
    average_precisions,
    class_precisions,
    coco_evaluation,
)
from fastvim_jax.training.evaluators import Evaluation, Evaluator
from fastvim_jax.training.steps import Batch, TrainState, gather_outside_blocks

HEADLINE = Headline("bbox_ap", label="box AP", title="Box AP on held-out images")
CLASS_SCORES = "class_scores.csv"
_REPORT_SECONDS = 10.0
LEAST_SCORE = 0.3
"""Detections of a lower score are not drawn."""

Detect = Callable[[Any, Batch], Any]
"""`detect(params, batch) -> (detections, index, valid)`, on every device."""


def make_detect(graphdef: nnx.GraphDef, preprocess: Preprocess) -> Detect:
    """Compile the detector on a batch of `make_eval_iterator`, once for each padded size."""

    @jax.jit
    def detect(params: Any, batch: Batch) -> Any:
        model: Any = nnx.merge(graphdef, gather_outside_blocks(params))
        crop_positions(model.backbone, (batch["image"].shape[1], batch["image"].shape[2]))
        found: Detections = model(preprocess(batch["image"]), scale=batch["scale"])
        return on_every_device((found, batch["index"], batch["valid"]))

    return detect


def make_evaluator(
    detect: Detect,
    batches: BatchIterator,
    place: Callable[[Any], Batch],
    folder: Path,
    *,
    name: str = "eval",
    masks: bool,
    every_epochs: int,
    pictures: int,
    progress: bool,
) -> Evaluator:
    """Return an evaluator that gives `count`, `raw_bbox_ap`, ..., `raw_segm_ap`, ..., and draws images into `folder`.

    Args:
        detect: from `make_detect`.
        batches: one pass over the data, rewound after each.
        place: puts a batch on the devices.
        folder: the run folder.
        name: kind of the log's records and stem of the picture's name.
        masks: whether the detector has masks, and is judged by them, too.
        every_epochs: epochs between evaluations; 0: only after the last step.
        pictures: images to draw, the first ones and as many of the worst of the others; 0: no picture.
        progress: say on standard error how far it is.
    """
    source: Any = batches.source

    def run(state: TrainState, step: int) -> Evaluation:
        weights = {"raw": state.params} | ({} if state.ema is None else {"ema": state.ema})
        found, seen = detect_all(detect, weights, batches, place, progress=progress)
        batches.rewind()
        scores: dict[str, Any] = {"count": len(seen)}
        for kind, detections in found.items():
            precisions = judge(source, detections, seen, masks=masks)
            scores |= {f"{kind}_{key}": value for key, value in precisions.items()}
        if corrupt := count_corrupt(batches.corrupt, batches.config):
            scores["corrupt_records"] = corrupt
        picture = None
        if is_first_process():
            rows = class_scores(source, found["raw"], seen, masks=masks)
            write_class_scores(folder / f"{name}_{CLASS_SCORES}", rows)
            if pictures:
                picture = folder / f"{name}_detections.png"
                drawn = [*seen[:pictures], *worst(source, found["raw"], seen[pictures:], pictures)]
                picture_grid([draw(source, i, found["raw"]) for i in drawn]).save(picture)
        return Evaluation(scores, picture)

    return Evaluator(name, run, every_epochs=every_epochs, batches=batches.steps_per_epoch)


def detect_all(
    detect: Detect,
    weights: Mapping[str, Any],
    batches: BatchIterator,
    place: Callable[[Any], Batch],
    *,
    progress: bool,
) -> tuple[dict[str, list[dict[str, Any]]], list[int]]:
    """Detect the objects of one pass over the data with each of some weights.

    Args:
        detect: from `make_detect`.
        weights: parameters by name.
        batches: one pass over the data.
        place: puts a batch on the devices.
        progress: say on standard error how far it is.

    Returns:
        Detections in COCO's format by the name of the weights, and the records that could be read.

    Raises:
        UserError: no image could be read.
    """
    source: Any = batches.source
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in weights}
    seen: list[int] = []
    said = time.monotonic()
    with contextlib.closing(place_ahead(batches, place)) as placed:
        for batch in placed:
            for number, (kind, params) in enumerate(weights.items()):
                for index, some in results(detect(params, batch), source):
                    found[kind] += some
                    seen += [] if number else [index]
            if progress and time.monotonic() - said > _REPORT_SECONDS and is_first_process():
                said = time.monotonic()
                print(f"evaluating: {len(seen)} of {len(source)} images", file=sys.stderr)
    if not seen:
        raise UserError("no image of the evaluation split could be read: check data.eval_split.")
    return found, sorted(seen)


def results(detected: Any, source: CocoSource) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield each valid record's index and its detections in COCO's format, masks as RLE at the image's size."""
    found, indices, valid = jax.device_get(detected)
    for row in np.flatnonzero(valid):
        index = int(indices[row])
        objects = source.objects(index)
        one = jax.tree.map(lambda x, row=row: x[row], found)
        records = as_coco(one, objects.height, objects.width, source.category_ids)
        yield index, [{"image_id": source.image_ids[index], **each} for each in records]


def as_coco(
    found: Detections, height: int, width: int, category_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Convert one image's detections (without batch axis) to COCO's results format.

    The model clips boxes to its padded input. Here they are clipped to the image, and those wholly in the padding are
    dropped.

    Args:
        found: from the model.
        height: of the original image.
        width: of the original image.
        category_ids: COCO's id of each label.
    """
    limits = np.asarray([width, height, width, height], np.float64)
    clipped = np.clip(np.asarray(found.boxes, np.float64), 0, limits)
    kept = np.flatnonzero(found.valid & (clipped[:, 2:] > clipped[:, :2]).all(1))
    boxes = np.asarray(found.boxes, np.float64)
    records: list[dict[str, Any]] = [
        {
            "category_id": category_ids[int(found.labels[i])],
            "bbox": [
                round(float(v), 3) for v in (*clipped[i, :2], *(clipped[i, 2:] - clipped[i, :2]))
            ],
            "score": round(float(found.scores[i]), 6),
        }
        for i in kept
    ]
    if found.masks is not None:
        encode = coco_masks().encode
        for record, i in zip(records, kept, strict=True):
            probability = np.asarray(found.masks[i], np.float64)
            # A mask fills the box as it was predicted.
            (mask,) = paste_masks(probability[None], boxes[i][None], height, width)
            rle = encode(np.asfortranarray(mask.astype(np.uint8)))
            record["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return records


def judge(
    source: CocoSource, detections: list[dict[str, Any]], indices: list[int], *, masks: bool
) -> dict[str, float]:
    """Return `bbox_ap`, `bbox_ap50`, ... and, with `masks`, `segm_ap`, ... over the records at `indices`."""
    ids = [source.image_ids[i] for i in indices]
    scores: dict[str, float] = {}
    for kind in _kinds(masks):
        evaluation = coco_evaluation(source.truth(kind), detections, kind, image_ids=ids)
        scores |= {f"{kind}_{k}": v for k, v in average_precisions(evaluation).items()}
    return scores


def _kinds(masks: bool) -> tuple[Any, ...]:
    return ("bbox", "segm") if masks else ("bbox",)


def write_class_scores(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the result of `class_scores` as CSV; an AP is empty where a class has no object."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()})


def class_scores(
    source: CocoSource, detections: list[dict[str, Any]], indices: list[int], *, masks: bool
) -> list[dict[str, Any]]:
    """Return `class`, `bbox_ap`, `segm_ap` (with `masks`) and `objects` of every class; an AP of None: no object."""
    ids = [source.image_ids[i] for i in indices]
    columns: Mapping[str, list[float]] = {
        f"{kind}_ap": class_precisions(
            coco_evaluation(source.truth(kind), detections, kind, image_ids=ids),
            len(source.class_names),
        )
        for kind in _kinds(masks)
    }
    counts = np.zeros(len(source.class_names), int)
    for i in indices:
        np.add.at(counts, source.objects(i).labels, 1)
    return [
        {
            "class": name,
            **{kind: None if aps[i] < 0 else aps[i] for kind, aps in columns.items()},
            "objects": int(counts[i]),
        }
        for i, name in enumerate(source.class_names)
    ]


def worst(
    source: CocoSource, detections: list[dict[str, Any]], indices: list[int], count: int
) -> list[int]:
    """Return the records with the most mistakes: objects not found, and drawn boxes that are no object.

    An object is found by a drawn box of its class with an IoU of 0.5 or more.
    """
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for each in detections:
        if each["score"] >= LEAST_SCORE:
            by_image.setdefault(each["image_id"], []).append(each)

    def mistakes(index: int) -> int:
        objects = source.objects(index)
        shown = by_image.get(source.image_ids[index], [])
        if not len(objects.boxes) or not shown:
            return len(objects.boxes) + len(shown)
        boxes = objects.boxes.astype(np.float64)
        truth = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        found = np.asarray([d["bbox"] for d in shown], np.float64)
        classes = np.asarray([source.category_ids.index(d["category_id"]) for d in shown])
        # Not by JAX, which would compile for every pair of numbers of boxes.
        hits = coco_masks().iou(found, truth, [0] * len(truth)).T >= 0.5
        hits &= objects.labels[:, None] == classes
        return int((~hits.any(1)).sum() + (~hits.any(0)).sum())

    ranked = sorted((-mistakes(index), index) for index in indices)
    return [index for mistaken, index in ranked[:count] if mistaken]


def draw(
    source: CocoSource, index: int, detections: list[dict[str, Any]]
) -> tuple[str, tuple[np.ndarray, ...]]:
    """Draw an image twice, with its true objects and with the detected ones, under a title."""
    image, objects = load(source, index)
    of_image = [d for d in detections if d["image_id"] == source.image_ids[index]]
    shown = [d for d in of_image if d["score"] >= LEAST_SCORE]
    names = source.class_names
    truth = [(box, names[i], None) for box, i in zip(objects.boxes, objects.labels, strict=True)]
    predicted = captioned(shown, dict(zip(source.category_ids, names, strict=True)))
    title = (
        f"image {source.image_ids[index]}: {counted(len(truth), 'object')}, {len(shown)} found ({LEAST_SCORE} or "
        "more)"
    )
    return title, (draw_objects(image, truth), draw_objects(image, predicted))


def captioned(detections: list[dict[str, Any]], names: Mapping[int, str]) -> list[Any]:
    """Return detections as `draw_objects` takes them, the best last: box, "class score", mask or None."""
    return [
        (
            np.asarray([*d["bbox"][:2], *np.add(d["bbox"][:2], d["bbox"][2:])]),
            f"{names[d['category_id']]} {d['score']:.2f}",
            coco_masks().decode(d["segmentation"]).astype(bool) if "segmentation" in d else None,
        )
        for d in sorted(detections, key=lambda d: d["score"])
    ]

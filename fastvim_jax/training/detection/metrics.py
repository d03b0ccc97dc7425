"""COCO's average precision of boxes and masks, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fastvim_jax.data.sources.coco import coco_masks

Kind = Literal["bbox", "segm"]
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""AP over IoU 0.5 to 0.95, at 0.5, at 0.75, and by area (below 32², to 96², above), 0 to 1; -1: nothing to count."""


def coco_evaluation(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    kind: Kind,
    *,
    image_ids: Sequence[Any] | None = None,
    most: tuple[int, ...] = (1, 10, 100),
) -> Any:
    """Evaluate detections and return pycocotools' `COCOeval` after `accumulate`.

    Args:
        truth: content of a COCO instances file.
        detections: `image_id`, `category_id`, `score` and, as the kind needs, `bbox` [x, y, w, h] or `segmentation`
            (RLE) of each.
        kind: bbox or segm.
        image_ids: images that count; None: all.
        most: numbers of detections per image that are evaluated, the largest last.
    """
    coco_masks()  # raises the error that names the extra
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Beside a box, pycocotools would take the box's area for the mask's, and count the mask as larger than it is.
    unused = "bbox" if kind == "segm" else "segmentation"
    judged = [{k: v for k, v in each.items() if k != unused} for each in detections]
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = dict(truth)
        reference.createIndex()
        found = reference.loadRes(judged) if judged else COCO()
        evaluation = COCOeval(reference, found, kind)
        evaluation.params.maxDets = list(most)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def average_precisions(evaluation: Any) -> dict[str, float]:
    """Return AP by the names in `NAMES`, with as many detections per image as the last entry of `most`."""
    precision = evaluation.eval["precision"]  # IoU, recall, category, area, detections
    at = lambda iou: np.flatnonzero(np.isclose(evaluation.params.iouThrs, iou))  # noqa: E731
    parts = [precision[..., 0, -1], precision[at(0.5), ..., 0, -1], precision[at(0.75), ..., 0, -1]]
    parts += [precision[..., area, -1] for area in (1, 2, 3)]
    return {name: _mean(part) for name, part in zip(NAMES, parts, strict=True)}


def class_precisions(evaluation: Any, classes: int) -> list[float]:
    """Return AP of every category, in the order of their ids; -1 where nothing counts."""
    precision = evaluation.eval["precision"]
    return [_mean(precision[:, :, i, 0, -1]) for i in range(classes)]


def _mean(precision: np.ndarray) -> float:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else -1.0

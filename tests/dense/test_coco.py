"""Average precision of given detections, boxes and masks, against the stored COCO numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvim_jax.training.detection.metrics import NAMES, average_precisions, coco_evaluation
from tests.dense.golden import fixtures, read
from tests.parity.compare import Comparison, close

masks = pytest.importorskip("pycocotools.mask")
EVALUATIONS = [path for path, kind in fixtures().items() if kind == "pycocotools COCOeval"]


@pytest.mark.skipif(not EVALUATIONS, reason="no golden numbers here: set FASTVIM_DENSE_DIR")
@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("path", EVALUATIONS, ids=[path.stem for path in EVALUATIONS])
def test_numbers_of_given_detections(path: Path, kind: str, record_property: Any) -> None:
    golden = read(path)
    x, m = golden.inputs, golden.meta
    height, width = m["image_size"]
    truth = {
        "images": [{"id": i, "height": height, "width": width} for i in m["image_ids"]],
        "categories": [{"id": i, "name": str(i)} for i in m["category_ids"]],
        "annotations": [
            {
                "id": j + 1,
                "image_id": int(x["gt_image"][j]),
                "category_id": int(x["gt_category"][j]),
                "bbox": x["gt_boxes_xywh"][j].tolist(),
                "area": float(x["gt_area"][j]),
                "iscrowd": int(x["gt_iscrowd"][j]),
                "segmentation": rle(x["gt_masks"][j]),
            }
            for j in range(len(x["gt_image"]))
        ],
    }
    detections = [
        {
            "image_id": int(x["det_image"][j]),
            "category_id": int(x["det_category"][j]),
            "score": float(x["det_score"][j]),
            "bbox": x["det_boxes_xywh"][j].tolist(),
            "segmentation": rle(x["det_masks"][j]),
        }
        for j in range(len(x["det_image"]))
    ]
    found = coco_evaluation(truth, detections, kind)
    comparison = Comparison(golden.name, golden.kind, "float64", kind)
    stats = golden.outputs[f"{kind}/stats"]
    comparison.output("AP", list(average_precisions(found).values()), stats[:6])
    comparison.output("precision", found.eval["precision"], golden.outputs[f"{kind}/precision"])
    comparison.output("recall", found.eval["recall"], golden.outputs[f"{kind}/recall"])
    many = average_precisions(coco_evaluation(truth, detections, kind, most=(100, 300, 1000)))
    comparison.output("1000", [many[n] for n in NAMES], golden.outputs[f"{kind}/mmdet_mAP"])
    close([comparison], record_property)


def test_no_detection_scores_zero() -> None:
    truth = {
        "images": [{"id": 1, "height": 9, "width": 9}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 4, 4],
                "area": 16,
                "iscrowd": 0,
            }
        ],
    }
    assert average_precisions(coco_evaluation(json.loads(json.dumps(truth)), [], "bbox"))["ap"] == 0


def test_a_masks_area_is_its_own_and_not_its_boxs() -> None:
    """Count a wrong mask of few pixels in a large box among the small objects."""
    shape = np.zeros((2, 100, 100), bool)
    shape[0, :10, :10] = True
    shape[1, 50:90, 50] = shape[1, 50, 50:90] = True  # An L of 79 pixels in a box of 1,600.
    truth = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {
                "id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0,
                "segmentation": rle(shape[0]),
            }
        ],
    }  # fmt: skip
    boxes = ([0, 0, 10, 10], [50, 50, 40, 40])
    detections = [
        {"image_id": 1, "category_id": 1, "score": s, "bbox": b, "segmentation": rle(m)}
        for s, b, m in zip((0.5, 0.9), boxes, shape, strict=True)
    ]
    small = {
        kind: average_precisions(coco_evaluation(truth, detections, kind))["ap_small"]
        for kind in ("bbox", "segm")
    }
    assert small == {"bbox": pytest.approx(1.0), "segm": pytest.approx(0.5)}


def rle(mask: np.ndarray) -> dict[str, Any]:
    return masks.encode(np.asfortranarray(mask.astype(np.uint8)))

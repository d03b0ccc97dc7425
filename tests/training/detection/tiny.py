"""The smallest detection run: a two-block FastVim on drawn scenes of two kinds of objects, seconds of compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.models import VisionMambaConfig, cascade_mask_rcnn
from fastvim_jax.models.detection import ProposalConfig, StageConfig
from fastvim_jax.training import OptimizerConfig
from fastvim_jax.training.detection.config import DetectionConfig

CLASSES = ("box", "bar")
COLOURS = ((200, 60, 50), (60, 80, 210))


def draw_scenes(root: Path, rng: np.random.Generator, *, train: int = 4, held_out: int = 2) -> None:
    """Write a COCO folder: rectangles of two kinds on noisy ground; one image is empty, one object a crowd."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", held_out)):
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count + 1):
            height, width = (int(side) for side in rng.integers(50, 70, 2))
            pixels = np.full((height, width, 3), (40, 120, 60)) + rng.integers(
                -20, 20, (height, width, 3)
            )
            name = f"{i}.png"
            images.append({"id": 100 + i, "file_name": name, "height": height, "width": width})
            for label, (h, w) in enumerate(((24, 24), (10, 40))) if i < count else ():
                y, x = int(rng.integers(height - h)), int(rng.integers(width - w))
                pixels[y : y + h, x : x + w] = COLOURS[label]
                mask: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": 100 + i,
                        "category_id": (3, 8)[label],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": mask,
                    }
                )
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name)
        crowd = {"size": [images[0]["height"], images[0]["width"]]}
        crowd["counts"] = [0, 60, crowd["size"][0] * crowd["size"][1] - 60]
        annotations.append(
            annotations[0] | {"id": len(annotations), "iscrowd": 1, "segmentation": crowd}
        )
        categories = [{"id": 3, "name": "box"}, {"id": 8, "name": "bar"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def copy_real_images(root: Path, coco: Path) -> tuple[str, ...]:
    """Write a COCO folder of a few real images with persons and bottles, one without any; return the classes.

    Args:
        root: the new folder.
        coco: the folder `coco_tiny` of the real data.
    """
    (root / "annotations").mkdir(parents=True)
    chosen = {
        "train2017": (24577, 60623, 204805, 278528, 412151),
        "val2017": (184324, 208901, 357888),
    }
    for split, ids in chosen.items():
        content = json.loads((coco / f"annotations/instances_{split}.json").read_text())
        content["images"] = [i for i in content["images"] if i["id"] in ids]
        content["categories"] = [
            c for c in content["categories"] if c["name"] in ("person", "bottle")
        ]
        kept = {c["id"] for c in content["categories"]}
        content["annotations"] = [
            a for a in content["annotations"] if a["image_id"] in ids and a["category_id"] in kept
        ]
        (root / split).mkdir()
        for image in content["images"]:
            shutil.copy(coco / split / image["file_name"], root / split)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return tuple(c["name"] for c in content["categories"])


def tiny_config(root: Path, **changes: Any) -> DetectionConfig:
    backbone = VisionMambaConfig(
        image_size=64,
        embed_dim=8,
        depth=1,
        state_size=4,
        num_classes=0,
        drop_path=0.1,
        blocks="unroll",
    )
    model = cascade_mask_rcnn(
        backbone, num_classes=2, width=8, hidden=8, box_convs=1, mask_convs=1, samples=16,
        stages=(StageConfig(0.5),),
        rpn=ProposalConfig(
            convs=1, scale=4.0, samples=16, train_before=20, train_after=20, test_before=20, test_after=20
        ),
        score=0.0, detections=5, candidates=30,
    )  # fmt: skip
    options: dict[str, Any] = {
        "model": model,
        "data": DetectionData(path=str(root), image_size=64, batch_size=2, scale=(0.5, 1.5), max_objects=3),
        "optimizer": OptimizerConfig(
            learning_rate=1e-3, learning_rate_scaling="none", schedule="warmup_step", warmup_epochs=0.5,
            warmup_start=1e-6, decay_groups="detection", layer_decay=0.7, layer_rule="blocks",
        ),
        "epochs": 2,
        "checkpoint_every_steps": 1,
        "log_every_steps": 1,
        "evaluate_every_epochs": 0,
        "pictures": 2,
    }  # fmt: skip
    return DetectionConfig(**{**options, **changes})

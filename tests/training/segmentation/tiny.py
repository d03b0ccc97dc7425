"""The smallest segmentation run: a two-block FastVim on drawn scenes of three classes, seconds of compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.models import UperNetConfig, VisionMambaConfig
from fastvim_jax.training import OptimizerConfig
from fastvim_jax.training.segmentation.config import SegmentationConfig

CLASSES = ("ground", "box", "bar")
COLOURS = np.asarray([[40, 120, 60], [200, 60, 50], [60, 80, 210]])


def draw_scenes(root: Path, rng: np.random.Generator, *, train: int = 4, held_out: int = 2) -> None:
    """Write a folder of images and masks: rectangles of two kinds on noisy ground, sizes differing."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split, count in (("training", train), ("validation", held_out)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            height, width = (int(side) for side in rng.integers(36, 60, 2))
            mask = np.zeros((height, width), np.uint8)
            for label, size in ((1, (14, 14)), (2, (6, 24))):
                top = int(rng.integers(height - size[0]))
                left = int(rng.integers(width - size[1]))
                mask[top : top + size[0], left : left + size[1]] = label
            pixels = COLOURS[mask] + rng.integers(-20, 20, (height, width, 3))
            mask[0, 0] = 255
            name = f"scene_{i}"
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / f"{name}.jpg")
            Image.fromarray(mask).save(root / "annotations" / split / f"{name}.png")


def tiny_config(root: Path, **changes: Any) -> SegmentationConfig:
    backbone = VisionMambaConfig(
        image_size=32, patch_size=8, embed_dim=8, depth=1, state_size=4, num_classes=0,
        drop_path=0.1, out_indices=(0, 0, 0, 0), blocks="unroll",
    )  # fmt: skip
    model = UperNetConfig(
        backbone, num_classes=3, channels=8, auxiliary_channels=4, pool_scales=(1, 2)
    )
    data = SegmentationData(
        path=str(root), image_size=32, batch_size=2, fit=(64, 40), eval_stride=20, workers=0
    )
    options: dict[str, Any] = {
        "model": model,
        "data": data,
        "optimizer": OptimizerConfig(
            learning_rate=2e-2, learning_rate_scaling="none", schedule="warmup_linear",
            warmup_epochs=0.5, warmup_start=1e-6, weight_decay=0.01, decay_groups="segmentation",
        ),
        "epochs": 2,
        "checkpoint_every_steps": 1,
        "log_every_steps": 1,
        "evaluate_every_epochs": 0,
        "eval_windows": 2,
        "pictures": 1,
    }  # fmt: skip
    return SegmentationConfig(**{**options, **changes})

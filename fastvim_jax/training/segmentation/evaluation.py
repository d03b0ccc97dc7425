"""Evaluation by slide inference: mIoU, mAcc and aAcc over all pixels of all images, and pictures of some.

All processes go through the same images. The windows of an image are shared by all devices, the counts of pixels are
whole numbers, so the scores do not depend on the number of devices.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from fastvim_jax.analysis.headline import Headline
from fastvim_jax.analysis.overlays import overlay, picture_grid
from fastvim_jax.data.geometry import resize_image
from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.segmentation import IGNORED, EvaluationImage, EvaluationImages, normalise
from fastvim_jax.distributed import (
    is_first_process,
    on_any_process,
    on_every_device,
    on_mesh,
    place_batch,
    round_up,
)
from fastvim_jax.errors import UserError, counted
from fastvim_jax.layers.resize import resize_bilinear
from fastvim_jax.models.segmentation.slide import Slide
from fastvim_jax.training.evaluators import Evaluation, Evaluator
from fastvim_jax.training.segmentation.config import SegmentationConfig
from fastvim_jax.training.segmentation.metrics import Areas, as_areas, count_areas
from fastvim_jax.training.steps import TrainState, gather_outside_blocks

HEADLINE = Headline("miou", label="mIoU", title="Mean IoU on held-out images", loss="loss")
CLASS_SCORES = "class_scores.csv"
PICTURE = "segmentation.png"
_REPORT_SECONDS = 10.0
_DRAWN = 640

Predict = Callable[[Any, Any, np.ndarray], jax.Array]
"""`predict(params, model_state, windows) -> logits`, of uint8 windows `n h w 3`."""


@dataclass(frozen=True)
class Judged:
    """One image and how well it was segmented, small enough to keep."""

    name: str
    accuracy: float
    pictures: tuple[np.ndarray, np.ndarray, np.ndarray]
    """The image, its labels and its predictions drawn over it."""


def make_predict(graphdef: nnx.GraphDef, config: SegmentationConfig, mesh: Mesh) -> Predict:
    """Compile the model on windows shared by the devices of `mesh`; every device gets all logits."""
    mean, std = config.data.mean, config.data.std

    @partial(on_mesh, mesh)
    @jax.jit
    def compiled(params: Any, model_state: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graphdef, gather_outside_blocks(params), model_state)
        images = normalise(batch["image"], batch["size"], mean, std)
        return on_every_device(model(images).main)

    def predict(params: Any, model_state: Any, windows: np.ndarray) -> jax.Array:
        share = len(windows) // jax.process_count()
        start = share * jax.process_index()

        def logits_of(batch: dict[str, np.ndarray]) -> jax.Array:
            part = {name: array[start : start + share] for name, array in batch.items()}
            return compiled(params, model_state, place_batch(mesh, part))

        return extended_logits(logits_of, windows, config.data.height_width)

    return predict


def extended_logits(
    logits_of: Callable[[dict[str, np.ndarray]], jax.Array],
    windows: UInt8[np.ndarray, "n h w 3"],
    crop: tuple[int, int],
) -> Float[Array, "n rows columns classes"]:
    """Compute the logits of windows that may be smaller than the crop, because their image is.

    Such windows are extended with zeros to the crop, as in training, and the logits of the extension are cut off. The
    model knows only such images: without the extension the positions of the patches, the means over rows and columns
    and the pooling pyramid of the head would be others. And a single program serves windows of all sizes.

    Args:
        logits_of: logits of a batch of crops, whose `image` is uint8 and whose `size` int32 `n 2` is that of the
            windows in them.
        windows: uint8 windows, at most as large as the crop.
        crop: height and width.

    Returns:
        Logits at any size that covers exactly the windows.
    """
    size = windows.shape[1], windows.shape[2]
    margins = [(0, full - side) for full, side in zip(crop, size, strict=True)]
    sizes = np.tile(np.asarray(size, np.int32), (len(windows), 1))
    logits = logits_of({"image": np.pad(windows, [(0, 0), *margins, (0, 0)]), "size": sizes})
    return logits if size == crop else _cut(logits, crop, size)


@partial(jax.jit, static_argnums=(1, 2))
def _cut(logits: jax.Array, crop: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    return resize_bilinear(logits, crop)[:, : size[0], : size[1]]


def make_evaluator(
    predict: Predict,
    images: EvaluationImages,
    config: SegmentationConfig,
    mesh: Mesh,
    folder: Path,
    *,
    progress: bool,
) -> Evaluator:
    """Return an evaluator that gives `count`, `raw_miou`, `raw_macc` and `raw_aacc`, and draws images into `folder`.

    Args:
        predict: from `make_predict`.
        images: the evaluation split.
        config: the run.
        mesh: the devices.
        folder: the run folder.
        progress: say on standard error how far it is.
    """
    slide = slide_of(config, round_up(config.eval_windows, mesh))

    def run(state: TrainState, step: int) -> Evaluation:
        forward = partial(predict, state.params, state.model_state)
        areas, judged, unread = judge(
            forward,
            images,
            slide,
            config.model.num_classes,
            keep=config.pictures,
            most_unread=config.data.max_corrupt,
            progress=progress,
        )
        scores: dict[str, Any] = {"count": len(images) - len(unread)}
        scores |= {f"raw_{name}": value for name, value in areas.scores().items()}
        if unread:
            scores["corrupt_records"] = len(unread)
        picture = None
        if is_first_process():
            write_class_scores(folder / CLASS_SCORES, areas, images.source.class_names)
            if judged:
                picture = folder / PICTURE
                picture_grid([_row(each) for each in judged]).save(picture)
        return Evaluation(scores, picture)

    return Evaluator("eval", run, every_epochs=config.evaluate_every_epochs, batches=len(images))


def slide_of(config: SegmentationConfig, windows: int) -> Slide:
    """Return how a run's images are cut into windows, `windows` in each call of the model."""
    return Slide(config.data.height_width, config.data.stride, batch=windows)


def judge(
    predict: Callable[[np.ndarray], jax.Array],
    images: EvaluationImages,
    slide: Slide,
    classes: int,
    *,
    keep: int = 0,
    most_unread: int | None = None,
    progress: bool = False,
) -> tuple[Areas, list[Judged], list[str]]:
    """Segment every image and count pixels.

    Args:
        predict: logits of uint8 windows.
        images: the evaluation split.
        slide: how images are cut into windows.
        classes: number of classes.
        keep: images to keep for a picture: the first ones, and as many of the worst of the others.
        most_unread: images that may be left out because they or their masks cannot be read; None: any number.
        progress: say on standard error how far it is.

    Returns:
        Areas over all images, the images kept, and why the others could not be read.

    Raises:
        DecodeError: more than `most_unread` images cannot be read.
        UserError: no image could be read.
    """
    total = Areas.zero(classes)
    kept: list[Judged] = []
    worst: list[Judged] = []
    unread: list[str] = []
    said = time.monotonic()
    for done, each in enumerate(images):
        # All processes leave it out together, because the model needs all of them.
        if on_any_process(each.label is None):
            error = each.error or f"{each.name}: another process cannot read it."
            unread.append(error)
            if most_unread is not None and len(unread) > most_unread:
                raise DecodeError(
                    f"{error}\n{counted(len(unread), 'image')} of the evaluation split cannot be judged; "
                    f"data.max_corrupt allows {most_unread}. Mend or remove the file, or raise data.max_corrupt."
                )
            continue
        assert each.label is not None
        predicted = slide(predict, each.image, each.label.shape)
        label = np.full(predicted.shape, IGNORED, np.uint8)
        label[: each.label.shape[0], : each.label.shape[1]] = each.label
        areas = as_areas(_count(predicted, label, classes))
        total += areas
        if keep:
            accuracy = areas.scores()["aacc"]
            if len(kept) < keep:
                kept.append(_judged(each, predicted, accuracy, classes))
            # An image without a labelled pixel has an accuracy of 0 and no mistake.
            elif areas.labelled.any() and (len(worst) < keep or accuracy < worst[-1].accuracy):
                worst.append(_judged(each, predicted, accuracy, classes))
                worst = sorted(worst, key=lambda judged: judged.accuracy)[:keep]
        if progress and time.monotonic() - said > _REPORT_SECONDS and is_first_process():
            said = time.monotonic()
            print(f"evaluating: {done + 1} of {len(images)} images", file=sys.stderr)
    if len(unread) == len(images):
        raise UserError(f"no image of the evaluation split could be read: {unread[0]}")
    return total, [*kept, *worst], unread


def write_class_scores(path: Path, areas: Areas, names: tuple[str, ...]) -> None:
    """Write IoU, accuracy and labelled pixels of every class as CSV; empty where a class has no pixel."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "iou", "accuracy", "labelled_pixels"])
        for name, iou, accuracy, pixels in zip(
            names, areas.iou, areas.accuracy, areas.labelled, strict=True
        ):
            ratios = ("" if np.isnan(r) else f"{r:.6f}" for r in (iou, accuracy))
            table.writerow([name, *ratios, int(pixels)])


_count = jax.jit(count_areas, static_argnums=2)


def _judged(each: EvaluationImage, predicted: jax.Array, accuracy: float, classes: int) -> Judged:
    assert each.label is not None
    height, width = each.label.shape
    factor = min(1.0, _DRAWN / max(height, width))
    size = max(1, int(height * factor)), max(1, int(width * factor))
    rows, columns = (np.arange(m) * n // m for n, m in zip((height, width), size, strict=True))
    small = resize_image(each.image, size)
    label = each.label[rows[:, None], columns].astype(np.int32)
    found = np.asarray(predicted)[:height, :width][rows[:, None], columns]
    found = np.where(label == IGNORED, classes, found)
    return Judged(
        Path(each.name).name,
        accuracy,
        (small, overlay(small, label, classes), overlay(small, found, classes)),
    )


def _row(judged: Judged) -> tuple[str, tuple[np.ndarray, ...]]:
    return (
        f"{judged.name}: image, labels, prediction ({judged.accuracy:.1%} right)",
        judged.pictures,
    )

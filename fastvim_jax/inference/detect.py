"""Detect objects in image files with a trained run: draw them, and write boxes and masks in COCO's format."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8
from PIL import Image

from fastvim_jax.analysis.detections import draw_objects
from fastvim_jax.data.detection import fit_image
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.data.prepare.shards import Progress
from fastvim_jax.data.sources.coco import coco_masks
from fastvim_jax.errors import counted
from fastvim_jax.inference.drawings import Drawing, read_files, require_pixels
from fastvim_jax.models.detection.positions import crop_positions
from fastvim_jax.training.detection.config import DetectionConfig
from fastvim_jax.training.detection.evaluation import LEAST_SCORE, as_coco, captioned
from fastvim_jax.training.run_folder import Run
from fastvim_jax.whole_file import whole_file

DetectOne = Callable[[UInt8[np.ndarray, "h w 3"]], list[dict[str, Any]]]
RESULTS = "detections.json"
SAVE_SECONDS = 60.0
"""Seconds after which the objects found so far are written."""
_NAMED = 5


def make_detector(run: Run) -> DetectOne:
    """Return a function from RGB pixels of any size to detections, highest score first.

    A detection is a dictionary of `category_id` (see `category_ids`), `bbox` [x, y, width, height] in pixels of the
    image, `score` and, if the detector has masks, `segmentation` (RLE). The model is compiled once for all image sizes,
    or once for each padded size if the run's data have `eval_sizes`.

    Args:
        run: a detection run, from `load_run`.
    """
    config = run.config
    assert isinstance(config, DetectionConfig)
    graphdef, state = nnx.split(run.model)
    preprocess = make_preprocess(config.data)
    ids = category_ids(run)

    @jax.jit
    def found_in(state: Any, images: jax.Array, scale: jax.Array) -> Any:
        model: Any = nnx.merge(graphdef, state)
        crop_positions(model.backbone, (images.shape[1], images.shape[2]))
        return model(preprocess(images), scale=scale)

    def detect(image: Any) -> list[dict[str, Any]]:
        image = require_pixels(image)
        fitted, scale = fit_image(image, config.data)
        found = jax.device_get(found_in(state, fitted[None], scale[None]))
        one = jax.tree.map(lambda x: x[0], found)
        return as_coco(one, image.shape[0], image.shape[1], ids)

    return detect


def category_ids(run: Run) -> tuple[int, ...]:
    """Return the data set's id of each class. Runs that did not record them number the classes from 0."""
    return run.class_ids or tuple(range(len(run.class_names)))


class _CocoFile:
    """Collect the objects of images in COCO's instances format, and write them once a minute and at the end."""

    def __init__(self, path: Path, names: dict[int, str]):
        self.path, self.saved = path, time.monotonic()
        categories = [{"id": i, "name": name} for i, name in names.items()]
        self.content: dict[str, list[Any]] = {
            "images": [], "annotations": [], "categories": categories
        }  # fmt: skip

    def add(self, file: str | Path, size: tuple[int, int], found: list[dict[str, Any]]) -> None:
        images, annotations = self.content["images"], self.content["annotations"]
        image = len(images) + 1
        images.append({"id": image, "file_name": str(file), "height": size[0], "width": size[1]})
        for each in found:
            place = {"id": len(annotations) + 1, "image_id": image}
            # COCO means the mask's area, if there is a mask.
            mask = each.get("segmentation")
            area = float(coco_masks().area(mask)) if mask else each["bbox"][2] * each["bbox"][3]
            annotations.append({**place, **each, "area": area, "iscrowd": 0})
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        with whole_file(self.path) as file:
            file.write_text(json.dumps(self.content), encoding="utf-8")
        self.saved = time.monotonic()


def draw_files(
    run: Run, files: Sequence[str | Path], out: Path, *, progress: Progress | None = None
) -> list[Drawing]:
    """Detect objects in files, draw NAME_detections.png for each file, and write all objects to detections.json.

    The JSON file has COCO's instances format (`images`, `categories`, `annotations`), with scores in `annotations`
    and the category ids of the data set that the run was trained on. If something ends this early, the file holds the
    images before, except for those of the last minute if the process was killed.
    """
    config = run.config
    assert isinstance(config, DetectionConfig)
    detect = make_detector(run)
    names = dict(zip(category_ids(run), run.class_names, strict=True))
    drawings: list[Drawing] = []
    results = _CocoFile(out / RESULTS, names)
    with contextlib.ExitStack() as ending:
        ending.callback(results.save)
        for file, name, image in read_files(files, config.data, drawings, progress):
            found = detect(image)
            shown = [d for d in found if d["score"] >= LEAST_SCORE]
            drawn = out / f"{name}_detections.png"
            Image.fromarray(draw_objects(image, captioned(shown, names))).save(drawn)
            results.add(file, image.shape[:2], found)
            by_name = [{"class": names[d["category_id"]], **d} for d in found]
            best = ", ".join(f"{names[d['category_id']]} {d['score']:.0%}" for d in shown[:_NAMED])
            text = f"{counted(len(shown), 'object')} with a score of {LEAST_SCORE} or more{': ' if best else ''}{best}"
            drawings.append(Drawing(str(file), (str(drawn),), by_name, text))
    return drawings

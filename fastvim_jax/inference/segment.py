"""Segment image files of any size with a trained run: predict every pixel's class, and write drawings and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int, UInt8
from PIL import Image

from fastvim_jax.analysis.overlays import class_colours, overlay
from fastvim_jax.data.geometry import fitted_size, resize_image
from fastvim_jax.data.prepare.shards import Progress
from fastvim_jax.data.segmentation import normalise
from fastvim_jax.inference.drawings import Drawing, read_files, require_pixels
from fastvim_jax.training.run_folder import Run
from fastvim_jax.training.segmentation.config import SegmentationConfig
from fastvim_jax.training.segmentation.evaluation import extended_logits, slide_of

Segment = Callable[[UInt8[np.ndarray, "h w 3"]], Int[np.ndarray, "h w"]]
_NAMED = 5


def make_segmenter(run: Run, *, windows: int | None = None) -> Segment:
    """Return a function from RGB pixels of any size to the class of every pixel, by slide inference.

    Args:
        run: a segmentation run, from `load_run`.
        windows: number of windows per call of the model; None: as in the run's evaluation.
    """
    config = run.config
    assert isinstance(config, SegmentationConfig)
    slide = slide_of(config, windows or config.eval_windows)
    graphdef, state = nnx.split(run.model)
    mean, std = config.data.mean, config.data.std

    @jax.jit
    def compiled(state, batch):
        return nnx.merge(graphdef, state)(normalise(batch["image"], batch["size"], mean, std)).main

    def predict(windows):
        return extended_logits(partial(compiled, state), windows, config.data.height_width)

    def segment(image):
        image = require_pixels(image)
        size = image.shape[0], image.shape[1]
        resized = resize_image(image, fitted_size(size, *config.data.fit))
        classes = slide(predict, resized, size)
        return np.asarray(classes)[: size[0], : size[1]]

    return segment


def draw_files(
    run: Run, files: Sequence[str | Path], out: Path, *, progress: Progress | None = None
) -> list[Drawing]:
    """Segment files and write NAME_overlay.png and NAME_mask.png for each; see `drawings.draw_files`.

    A mask holds the same labels as the training masks: class k is k, or k + 1 if 0 means unlabelled. It is an 8-bit PNG
    with a palette, so that viewers show it in colours.
    """
    config = run.config
    assert isinstance(config, SegmentationConfig)
    segment, classes = make_segmenter(run), config.model.num_classes
    shift = 1 if config.data.zero_is_ignored else 0
    palette = np.zeros((256, 3), np.uint8)
    palette[shift : shift + classes] = class_colours(classes)[: 256 - shift]
    drawings: list[Drawing] = []
    for file, name, image in read_files(files, config.data, drawings, progress):
        found = segment(image)
        drawn, masked = out / f"{name}_overlay.png", out / f"{name}_mask.png"
        Image.fromarray(overlay(image, found, classes)).save(drawn)
        mask = Image.fromarray((found + shift).astype(np.uint8))
        mask.putpalette(palette.tobytes())
        mask.save(masked)
        shares = np.bincount(found.ravel(), minlength=classes) / found.size
        order = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] > 0]
        by_name = [
            {"class": run.class_names[i], "label": i + shift, "share": float(shares[i])}
            for i in order
        ]
        named = ", ".join(f"{run.class_names[i]} {shares[i]:.1%}" for i in order[:_NAMED])
        drawings.append(Drawing(str(file), (str(drawn), str(masked)), by_name, named))
    return drawings

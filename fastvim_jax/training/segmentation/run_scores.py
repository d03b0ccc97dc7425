"""Score a trained segmentation run on any data, over all devices."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

from flax import nnx

from fastvim_jax.data.segmentation import EvaluationImages
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.distributed import MeshConfig, connect, make_mesh, replicated, round_up
from fastvim_jax.errors import UserError
from fastvim_jax.training.course import require_same_course
from fastvim_jax.training.run_folder import load_run, read_config
from fastvim_jax.training.segmentation.config import SegmentationConfig
from fastvim_jax.training.segmentation.evaluation import judge, make_predict, slide_of
from fastvim_jax.training.segmentation.metrics import Areas


@dataclasses.dataclass(frozen=True)
class SegmentationScores:
    """The result of `score_run`.

    Attributes:
        step: the checkpoint's.
        count: images segmented.
        class_names: of the run.
        areas: pixels of each class over all images.
        unread: why other images could not be read.
    """

    step: int
    count: int
    class_names: tuple[str, ...]
    areas: Areas
    unread: tuple[str, ...]


def score_run(
    run_dir: Path | str,
    data: SegmentationData | None = None,
    *,
    step: int | Literal["best"] | None = None,
    progress: bool = False,
) -> SegmentationScores:
    """Evaluate a run by slide inference on `data.eval_split`; every pixel is counted once.

    Args:
        run_dir: the run folder.
        data: what to evaluate on; None: what the run was evaluated on.
        step: which checkpoint; None: the latest.
        progress: say on standard error how far it is.

    Raises:
        UserError: no run of segmentation, or data with another number of classes.
    """
    config = read_config(run_dir)
    if not isinstance(config, SegmentationConfig):
        raise UserError(f"{run_dir} is no run of segmentation.")
    config = dataclasses.replace(config, data=data or config.data)
    images = EvaluationImages(config.data)
    if len(images.source.class_names) != config.model.num_classes:
        raise UserError(
            f"{run_dir} tells {config.model.num_classes} classes apart, the data have "
            f"{len(images.source.class_names)}."
        )
    names = images.source.class_names
    require_same_course({"data": config.data}, names, images=len(images), step=step)
    mesh = make_mesh(MeshConfig())
    connect(replicated(mesh))
    run = load_run(run_dir, step=step, place=replicated(mesh), class_names=names)
    graphdef, *states = nnx.split(run.model, nnx.Param, nnx.BatchStat)
    predict = partial(make_predict(graphdef, config, mesh), states[0], states[1])
    slide = slide_of(config, round_up(config.eval_windows, mesh))
    with contextlib.closing(images):
        areas, _, unread = judge(
            predict, images, slide, config.model.num_classes, progress=progress
        )
    count = len(images) - len(unread)
    return SegmentationScores(run.step, count, run.class_names, areas, tuple(unread))

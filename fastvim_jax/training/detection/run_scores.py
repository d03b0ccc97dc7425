"""Score a trained detection run on any data, over all devices."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from fastvim_jax.data.detection import describe_eval_sizes, make_eval_iterator
from fastvim_jax.data.detection_config import DetectionData
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.distributed import (
    MeshConfig,
    connect,
    is_first_process,
    make_mesh,
    on_mesh,
    place_batch,
    replicated,
    round_up,
)
from fastvim_jax.errors import UserError
from fastvim_jax.training.course import require_same_course
from fastvim_jax.training.detection.config import DetectionConfig
from fastvim_jax.training.detection.evaluation import class_scores, detect_all, judge, make_detect
from fastvim_jax.training.run_folder import load_run, read_config


@dataclasses.dataclass(frozen=True)
class DetectionScores:
    """The result of `score_run`.

    Attributes:
        step: the checkpoint's.
        weights: `raw` or `ema`.
        count: images judged.
        scores: `bbox_ap`, `bbox_ap50`, ... and, of a detector with masks, `segm_ap`, ..., from 0 to 1; -1: nothing to
            count.
        classes: of every class `class`, `bbox_ap`, `segm_ap` and `objects`.
    """

    step: int
    weights: str
    count: int
    scores: dict[str, float]
    classes: list[dict[str, Any]]


def score_run(
    run_dir: Path | str,
    data: DetectionData | None = None,
    *,
    weights: str | None = None,
    step: int | Literal["best"] | None = None,
    progress: bool = False,
) -> DetectionScores:
    """Evaluate a run on `data.eval_split` by pycocotools.

    Args:
        run_dir: the run folder.
        data: what to evaluate on; None: what the run was evaluated on.
        weights: `raw` or `ema`; None: see `load_run`.
        step: which checkpoint; None: the latest.
        progress: say on standard error how far it is.

    Raises:
        UserError: no run of detection, or data with other categories.
    """
    config = read_config(run_dir)
    if not isinstance(config, DetectionConfig):
        raise UserError(f"{run_dir} is no run of detection.")
    data = data or config.data
    mesh = make_mesh(MeshConfig())
    batches = make_eval_iterator(
        data,
        batch_size=round_up(data.eval_batch_size or data.batch_size, mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if progress and is_first_process():
        for line in describe_eval_sizes(data):
            print(line, file=sys.stderr)
    with contextlib.closing(batches):
        source: Any = batches.source
        require_same_course(
            {"data": data},
            source.class_names,
            batches=batches.steps_per_epoch,
            weights=weights,
            step=step,
        )
        connect(replicated(mesh))
        run = load_run(
            run_dir,
            weights=weights,
            step=step,
            place=replicated(mesh),
            class_names=source.class_names,
        )
        if run.class_names != source.class_names:
            raise UserError(
                f"{run_dir} knows the {len(run.class_names)} categories {', '.join(run.class_names[:5])}, ..., but the "
                f"data list {len(source.class_names)}: {', '.join(source.class_names[:5])}, ..."
            )
        graphdef, params = nnx.split(run.model)
        detect = on_mesh(mesh, make_detect(graphdef, make_preprocess(data)))
        found, seen = detect_all(
            detect, {"it": params}, batches, partial(place_batch, mesh), progress=progress
        )
    masks = config.model.masks
    scores = judge(source, found["it"], seen, masks=masks)
    classes = class_scores(source, found["it"], seen, masks=masks)
    return DetectionScores(run.step, run.weights, len(seen), scores, classes)

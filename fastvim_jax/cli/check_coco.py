"""`fastvim data check-coco PATH`: list problems of images and objects in COCO's format."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fastvim_jax.cli.usage import UsageError, as_usage_error, command, parse
from fastvim_jax.data.sources.coco import ANNOTATIONS, IMAGES
from fastvim_jax.errors import counted


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The data set to scan. The options have the names of the fields in an experiment's `data`."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The data set's folder."""
    split: tuple[str, ...] = ()
    """Splits to scan: the values of {split} in --annotations and --images; by default all of which there is a file of
    annotations."""
    annotations: str = ANNOTATIONS
    """The JSON file of annotations, relative to FOLDER."""
    images: str = IMAGES
    """The folder of the images, relative to FOLDER."""
    workers: int = 0
    """Worker processes; 0: this process alone."""
    list: int = 20
    """Problems of each split to list; the others are counted."""
    json: bool = False
    """Print JSON, with every problem."""


def run(arguments: Sequence[str]) -> int:
    """List what is wrong with images and objects. The exit status is 1 if there is a problem."""
    chosen = parse(Arguments, "data check-coco", arguments, f"{run.__doc__}")
    from fastvim_jax.cli.progress import progress_bar
    from fastvim_jax.data.detection import open_coco
    from fastvim_jax.data.detection_config import DetectionData
    from fastvim_jax.data.prepare.check_coco import check_coco

    with as_usage_error():
        config = DetectionData(
            path=chosen.path, annotations=chosen.annotations, images=chosen.images
        )
    found, as_json = False, {}
    masks: dict[str, int] = {}
    splits = chosen.split or _splits(config.path, chosen.annotations)
    for split in splits:
        source = open_coco(config, split, allow_missing=True)
        with progress_bar(f"checking {split}", quiet=chosen.json) as progress:
            report = check_coco(source, workers=chosen.workers, progress=progress)
        found, masks[split] = found or bool(report.problems), report.masks
        if chosen.json:
            as_json[split] = dataclasses.asdict(report)
            continue
        used = sum(count > 0 for count in report.objects.values())
        objects = sum(report.objects.values())
        print(
            f"{split}: {counted(report.records, 'image')} ({report.empty} without objects), "
            f"{counted(objects, 'object')} and "
            f"{counted(report.crowds, 'crowd')}, {used} of {counted(len(report.objects), 'category', 'categories')}, "
            f"{counted(len(report.problems), 'problem')}"
        )
        for note in report.notes:
            print(f"  note: {note}")
        for problem in report.problems[: chosen.list]:
            print(f"  {problem.kind}: {problem.message}")
        if len(report.problems) > chosen.list:
            counts = Counter(problem.kind for problem in report.problems)
            print(
                f"  ... in all {', '.join(f'{n} {k}' for k, n in counts.items())} (--list, --json)"
            )
    if chosen.json:
        print(json.dumps(as_json, indent=2, ensure_ascii=False))
    else:
        print("Something is wrong, see above." if found else "Nothing is wrong.")
        told = _train_command(chosen, masks, len(source.class_names))
        print(f"Train on it: {told} (docs/dense.md)")
    return int(found)


def _splits(path: str, pattern: str) -> list[str]:
    """List the splits whose file of annotations exists; at least one.

    Raises:
        UsageError: there is none.
    """
    from fastvim_jax.data.sources import expand_path

    root = expand_path(path)
    before, given, after = Path(pattern).as_posix().partition("{split}")
    start = os.path.join(root, before)
    files = sorted(glob.glob(f"{glob.escape(start)}*{glob.escape(after)}")) if given else []
    found = [file[len(start) : len(file) - len(after)] for file in files]
    if not found:
        raise UsageError(
            f"no file matches {str(root / pattern)!r}: correct --annotations, or name the splits with --split."
        )
    return found


def _train_command(chosen: Arguments, masks: Mapping[str, int], classes: int) -> str:
    """Return the command that trains on this folder; `masks` counts those of each split."""
    from fastvim_jax.data.prepare.advice import splits_by_name

    train, held_out = splits_by_name(tuple(masks))
    options = {
        "data.path": chosen.path,
        "model.num-classes": "" if classes == 80 else str(classes),
        "data.train-split": "" if train == "train2017" else train,
        "data.eval-split": "" if held_out == "val2017" else held_out,
        "data.annotations": "" if chosen.annotations == ANNOTATIONS else chosen.annotations,
        "data.images": "" if chosen.images == IMAGES else chosen.images,
    }
    given = [f"--{name} {shlex.quote(value)}" for name, value in options.items() if value]
    given += [] if masks[train] else ["--data.no-masks --model.no-masks"]
    return " ".join([command(), "train coco/fastvim_tiny", *given])

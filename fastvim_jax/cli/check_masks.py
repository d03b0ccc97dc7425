"""`fastvim data check-masks PATH`: list problems of a folder of images and label maps."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro

from fastvim_jax.cli.usage import UsageError, as_usage_error, command, parse
from fastvim_jax.data.sources.mask_folder import IMAGE_PATTERN, MASK_PATTERN
from fastvim_jax.errors import counted


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The data set to scan. The options have the names of the fields in an experiment's `data`."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The data set's folder."""
    split: tuple[str, ...] = ()
    """Splits to scan: values of {split} in the patterns; by default every folder in its place."""
    image_pattern: str = IMAGE_PATTERN
    """Pattern of the images' paths, relative to FOLDER. {name} may contain folders."""
    mask_pattern: str = MASK_PATTERN
    """Pattern of the masks' paths. The mask of an image has the same {name}."""
    class_list: str = ""
    """A class list (.txt, .tsv or ADE20K's .csv) to use instead of the folder's own."""
    classes: int = 0
    """Number of classes, if there is no class list."""
    zero_is_ignored: bool | None = None
    """Whether label 0 means unlabelled, and label k means class k - 1; by default if the class list is a table that
    numbers its classes from 1, as ADE20K's."""
    ignored_label: int = 255
    """Label of pixels that do not count."""
    workers: int = 0
    """Worker processes; 0: this process alone."""
    list: int = 20
    """Problems of each split to list; the others are counted."""
    json: bool = False
    """Print JSON, with every problem."""


def run(arguments: Sequence[str]) -> int:
    """List what is wrong with images and label maps. The exit status is 1 if there is a problem."""
    chosen = parse(Arguments, "data check-masks", arguments, f"{run.__doc__}")
    from fastvim_jax.cli.progress import progress_bar
    from fastvim_jax.data.prepare.check_masks import check_masks, count_problems
    from fastvim_jax.data.segmentation import open_masks
    from fastvim_jax.data.segmentation_config import SegmentationData
    from fastvim_jax.data.sources import expand_path
    from fastvim_jax.data.sources.mask_folder import counts_from_one

    if chosen.zero_is_ignored is None:
        with as_usage_error():
            root, listed = expand_path(chosen.path), expand_path(chosen.class_list)
        zero = counts_from_one(root, listed if chosen.class_list else None)
        chosen = dataclasses.replace(chosen, zero_is_ignored=zero)
    with as_usage_error():
        config = SegmentationData(
            path=chosen.path,
            image_pattern=chosen.image_pattern,
            mask_pattern=chosen.mask_pattern,
            class_list=chosen.class_list,
            classes=chosen.classes,
            zero_is_ignored=bool(chosen.zero_is_ignored),
            ignored_label=chosen.ignored_label,
        )
    found, as_json = False, {}
    splits = chosen.split or _splits(config.path, chosen.image_pattern)
    for split in splits:
        source = open_masks(config, split, allow_missing=True)
        with progress_bar(f"checking {split}", quiet=chosen.json) as progress:
            report = check_masks(source, config, workers=chosen.workers, progress=progress)
        found = found or bool(report.problems)
        if chosen.json:
            as_json[split] = {
                "records": report.records,
                "ignored": report.ignored,
                "pixels": dict(zip(source.class_names, report.pixels.tolist(), strict=True)),
                "problems": [dataclasses.asdict(problem) for problem in report.problems],
                "notes": list(report.notes),
            }
            continue
        used = int((report.images > 0).sum())
        print(
            f"{split}: {counted(report.records, 'image')}, {used} of "
            f"{counted(len(source.class_names), 'class', 'classes')}, "
            f"{report.ignored:.1%} of the pixels ignored, {counted(len(report.problems), 'problem')}"
        )
        for note in report.notes:
            print(f"  note: {note}")
        for problem in report.problems[: chosen.list]:
            print(f"  {problem.kind}: {problem.message}")
        if len(report.problems) > chosen.list:
            counts = ", ".join(f"{n} {kind}" for kind, n in count_problems(report).items())
            print(f"  ... in all {counts} (--list, --json)")
    if chosen.json:
        print(json.dumps(as_json, indent=2, ensure_ascii=False))
    else:
        print("Something is wrong, see above." if found else "Nothing is wrong.")
        told = _train_command(chosen, splits, len(source.class_names))
        print(f"Train on it: {told} (docs/dense.md)")
    return int(found)


def _train_command(chosen: Arguments, splits: Sequence[str], classes: int) -> str:
    """Return the command that trains on this folder."""
    from fastvim_jax.data.prepare.advice import splits_by_name

    train, held_out = splits_by_name(splits)
    options = {
        "data.path": chosen.path,
        "model.num-classes": str(classes),
        "data.train-split": "" if train == "training" else train,
        "data.eval-split": "" if held_out == "validation" else held_out,
        "data.image-pattern": "" if chosen.image_pattern == IMAGE_PATTERN else chosen.image_pattern,
        "data.mask-pattern": "" if chosen.mask_pattern == MASK_PATTERN else chosen.mask_pattern,
        "data.class-list": chosen.class_list,
        "data.classes": str(chosen.classes or ""),
        "data.ignored-label": "" if chosen.ignored_label == 255 else str(chosen.ignored_label),
    }
    given = [f"--{name} {shlex.quote(value)}" for name, value in options.items() if value]
    zero = "--data.zero-is-ignored" if chosen.zero_is_ignored else "--data.no-zero-is-ignored"
    return " ".join([command(), "train ade20k/fastvim_tiny", *given, zero])


def _splits(path: str, pattern: str) -> list[str]:
    """List the folders that stand where the pattern has {split}; at least one.

    Raises:
        UsageError: there is none.
    """
    from fastvim_jax.data.sources import expand_path
    from fastvim_jax.data.sources.image_folder import folders_in

    before, found, after = pattern.partition("{split}")
    parent = expand_path(path) / before.rpartition("/")[0]
    if not found or not after.startswith("/") or not parent.is_dir():
        raise UsageError(f"no splits are found in {str(parent)!r}: name them with --split.")
    splits = folders_in(parent)
    if not splits:
        raise UsageError(
            f"{str(parent)!r} holds no folder of a split: name the splits with --split."
        )
    return splits

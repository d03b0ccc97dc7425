"""Scan images and label maps: read and decode every pair once, and list the problems that training would meet."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np

from fastvim_jax.data.prepare.check import Problem
from fastvim_jax.data.prepare.processes import map_source
from fastvim_jax.data.prepare.shards import Progress
from fastvim_jax.data.records import DecodeError, read_record
from fastvim_jax.data.segmentation import IGNORED, load_scene
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.data.sources.mask_folder import MaskFolderSource, read_mask
from fastvim_jax.errors import counted

_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class MaskReport:
    """The findings of a scan of one split.

    Attributes:
        records: images.
        pixels: labelled pixels of each class, int64.
        images: images in which each class occurs.
        ignored: share of pixels that do not count, from 0 to 1.
        problems: what is wrong: kinds `missing`, `stray`, `unreadable`, `off by one`.
        notes: texts about unusual things that are understood.
    """

    records: int
    pixels: np.ndarray
    images: np.ndarray
    ignored: float
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Scanned:
    index: int
    pixels: np.ndarray
    ignored: int
    raw: np.ndarray
    error: str | None


def check_masks(
    source: MaskFolderSource,
    config: SegmentationData,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> MaskReport:
    """Read every image and its mask.

    Args:
        source: a source opened with `allow_missing=True`, so that a missing mask does not stop the scan.
        config: what labels mean.
        workers: processes.
        progress: called with the records done and their total.
    """
    classes = len(source.class_names)
    pixels, images = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    ignored, raw = 0, np.zeros(0, np.int64)
    problems = [Problem("missing", f"{name}: there is no mask.") for name in source.missing]
    problems += [Problem("stray", f"{name}: no image belongs to it.") for name in source.stray]
    parts = [range(len(source))[i : i + _CHUNK] for i in range(0, len(source), _CHUNK)]
    done = 0
    for _, scanned in map_source(partial(_scan, config=config), source, parts, workers=workers):
        for each in scanned:
            done += 1
            raw = np.union1d(raw, each.raw)
            if each.error is not None:
                problems.append(Problem("unreadable", each.error, each.index))
                continue
            pixels += each.pixels
            images += each.pixels > 0
            ignored += each.ignored
        if progress:
            progress(done, len(source))
    if shift := _shift(raw, classes, config):
        problems.insert(0, Problem("off by one", shift))
    total = int(pixels.sum()) + ignored
    return MaskReport(
        len(source),
        pixels,
        images,
        ignored / max(total, 1),
        tuple(sorted(problems, key=lambda p: (p.kind != "off by one", p.kind, p.index or 0))),
        tuple(
            _notes(raw, [n for n, used in zip(source.class_names, images, strict=True) if not used])
        ),
    )


def _scan(source: MaskFolderSource, indices: range, *, config: SegmentationData) -> list[_Scanned]:
    return list(_scan_pairs(source, indices, config))


def _scan_pairs(
    source: MaskFolderSource, indices: range, config: SegmentationData
) -> Iterator[_Scanned]:
    for index in indices:
        raw = np.zeros(0, np.int64)
        none = np.zeros(len(source.class_names), np.int64)
        try:
            record = read_record(source, index)
            if record.target is None:
                continue
            raw = np.unique(read_mask(record.target, name=source.mask_name(index)))
            mask = load_scene(source, index, config).mask
        except DecodeError as error:
            yield _Scanned(index, none, 0, raw, str(error))
            continue
        assert mask is not None
        counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)
        yield _Scanned(index, counts[: len(none)], int(counts[IGNORED]), raw, None)


def _shift(raw: np.ndarray, classes: int, config: SegmentationData) -> str | None:
    """Say whether labels look shifted against the classes by one; None if they do not."""
    used = raw[raw != config.ignored_label]
    if not used.size:
        return None
    if not config.zero_is_ignored and used.max() == classes:
        return (
            f"labels run from {used.min()} to {classes}, but {counted(classes, 'class is', 'classes are')} numbered "
            "from 0: if 0 means unlabelled, set --zero-is-ignored (data.zero_is_ignored)."
        )
    if config.zero_is_ignored and used.max() == classes - 1 and used.min() == 0:
        return (
            f"labels run from 0 to {classes - 1}: with zero_is_ignored class 0 is never learned and the last class "
            "never seen, unless 0 really means unlabelled."
        )
    return None


def _notes(raw: np.ndarray, unused: list[str]) -> Iterator[str]:
    if unused:
        shown = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        yield f"{counted(len(unused), 'class has', 'classes have')} no pixel: {shown}"
    if raw.size and raw.max() > IGNORED:
        yield f"16-bit masks: labels up to {int(raw.max())} are read as they are."


def count_problems(report: MaskReport) -> dict[str, int]:
    """Count the problems by kind."""
    return dict(Counter(problem.kind for problem in report.problems))

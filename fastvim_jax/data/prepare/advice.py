"""Explain what a scan's findings mean: why training would refuse the data, and which options accept them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastvim_jax.data.prepare.check import Report
from fastvim_jax.data.sources.image_folder import HELD_OUT, TRAINED, WHOLE
from fastvim_jax.errors import counted

BATCH_SIZE = 32
"""Batch size of the experiment that the options are for, `your_images/fastvim`."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """How to train on a data set.

    Attributes:
        refused: reasons why training would refuse the data, one line each; empty if training would start.
        options: options for the experiment by name, without the path and the kind of the data set.
        notes: explanations of the chosen options.
    """

    refused: tuple[str, ...]
    options: dict[str, str]
    notes: tuple[str, ...]


def training_advice(reports: dict[str, Report]) -> Advice:
    """Choose the splits to train and to evaluate on, and the options that make a training start.

    Without a split to evaluate on, a stratified part of the training split is held out: every tenth record of each
    class, or every fifth or second of small classes.
    """
    refused: list[str] = []
    options: dict[str, str] = {}
    notes: list[str] = []
    train = next((name for name in TRAINED if name in reports), None)
    held_out = next((name for name in HELD_OUT if name in reports), None)
    if train is None:
        others = [name for name in reports if name != held_out]
        if len(others) != 1:
            found = ", ".join(reports)
            return Advice(
                (f"there is no split to train on among {found}: call one train.",), {}, ()
            )
        train = others[0]
    report = reports[train]
    records = report.records
    if train != "train":
        options["data.train-split"] = train
    if held_out is None:
        parts = _parts(report)
        options["data.train-split"] = f"{train}[-1/{parts}]"
        options["data.eval-split"] = f"{train}[1/{parts}]"
        whole = "the whole folder" if train == WHOLE else train
        notes.append(
            f"there is no split to evaluate on: one record in {parts} of each class is held out of {whole}."
        )
        records -= sum(-(-count // parts) for count in report.counts.values())
    elif held_out != "val":
        options["data.eval-split"] = held_out
    used = {train: report} | ({held_out: reports[held_out]} if held_out else {})
    for name, each in used.items():
        stray = sum(problem.kind == "label" for problem in each.problems)
        if stray:
            refused.append(
                f"{name} has {counted(stray, 'label')} outside its {counted(each.classes, 'class', 'classes')}."
            )
        broken = sum(problem.kind == "undecodable" for problem in each.problems)
        if 2 * broken >= each.records:
            refused.append(
                f"{name} has {counted(each.records, 'record')}, {broken} of them undecodable."
            )
    if held_out and reports[held_out].classes != report.classes:
        refused.append(
            f"{train} has {counted(report.classes, 'class', 'classes')}, {held_out} {reports[held_out].classes}: "
            "put a classes.txt with all names beside the data."
        )
    corrupt = max(sum(p.kind == "undecodable" for p in each.problems) for each in used.values())
    if corrupt:
        options["data.max-corrupt"] = str(corrupt)
        notes.append(f"up to {counted(corrupt, 'undecodable record')} of a split left out.")
    if any(p.kind == "checksum" for each in used.values() for p in each.problems):
        notes.append(
            "training does not compare checksums: first give the `fastvim data prepare` command again, which writes "
            "changed shards anew and keeps the others."
        )
    if records < 1:
        refused.append(f"{train} leaves no record to train on.")
    elif records < BATCH_SIZE:
        options["data.batch-size"] = str(records)
    options["model.num-classes"] = str(report.classes)
    return Advice(tuple(refused), options, tuple(notes))


def splits_by_name(found: Sequence[str]) -> tuple[str, str]:
    """Choose the splits to train and to evaluate on by how their names begin; the first and the last, if none does so.

    Names may go on: train2017, validation_small.
    """
    train = next((name for name in found if name.lower().startswith(TRAINED)), found[0])
    others = [name for name in found if name != train] or [train]
    held_out = (name for part in HELD_OUT for name in others if name.lower().startswith(part))
    return train, next(held_out, others[-1])


def _parts(report: Report) -> int:
    smallest = min((count for count in report.counts.values() if count), default=0)
    return 10 if smallest >= 10 else 5 if smallest >= 5 else 2

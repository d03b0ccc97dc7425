"""Labels that a data set stores as numbers: each must be the index of a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastvim_jax.data.records import Source
from fastvim_jax.data.sources.class_lists import find_class_list, read_class_list
from fastvim_jax.errors import UserError


def names_of_labels(
    labels: np.ndarray,
    where: str,
    *,
    own: tuple[str, ...] | None = None,
    root: Path | None = None,
    class_list: Path | None = None,
    any_label: bool = False,
) -> tuple[str, ...]:
    """Choose the class names of a split: the class list given, else the data set's own, else the list in its folder.

    Args:
        labels: every label of the split.
        where: the split, for the error message.
        own: names stored with the data.
        root: folder that may hold `classes.txt` or `classes.tsv`.
        class_list: overrides both.
        any_label: let labels outside the classes pass (a scan lists them).

    Raises:
        UserError: when a label lies outside the classes.
    """
    classes = read_class_list(class_list) if class_list else None
    if classes is None and own is None and root is not None:
        classes = find_class_list(root)
    highest = int(labels.max()) if len(labels) else -1
    names = classes.names if classes else own
    if names is None:
        names = tuple(str(i) for i in range(highest + 1))
    if any_label or not len(labels):
        return names
    lowest = int(labels.min())
    if highest >= len(names):
        raise UserError(
            f"{where} holds the label {highest}, but the class list names only {len(names)} classes."
        )
    if lowest < 0:
        raise UserError(
            f"{where} holds the label {lowest}: {int((labels < 0).sum())} of {len(labels)} records have none, "
            "as in a test split whose labels are secret. Use another split."
        )
    return names


def refuse_stray_labels(source: Source) -> None:
    """Refuse a source, opened with `any_label=True`, that knows its labels and has some outside its classes.

    Raises:
        UserError: naming the first such record.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        return
    stray = np.flatnonzero((labels < 0) | (labels >= len(source.class_names)))
    if len(stray):
        first = int(stray[0])
        others = f" ({len(stray)} of {len(labels)} records have such a label)"
        raise UserError(
            stray_label(source[first].name, int(labels[first]), len(source.class_names), others)
        )


def stray_label(name: str, label: int, classes: int, others: str = "") -> str:
    """Say what is wrong with a record whose label is no class, and what to do."""
    return (
        f"{name}: the label {label} is outside the {classes} classes{others}. `fastvim data check` lists all such "
        "records: mend them, give the class list that they belong to, or leave this split out (--split)."
    )

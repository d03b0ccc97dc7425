"""Check labels that a data set stores as numbers: each must be the index of a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.data.records import Source
from fastvim_jax.data.sources.class_lists import ClassList, find_class_list, read_class_list
from fastvim_jax.errors import UserError, counted

MOST_CLASSES = 1_000_000
"""Labels from here on are refused where no class list says that there are so many classes."""


def whole_labels(values: Any, where: str, names: tuple[str, ...] | None = None) -> np.ndarray:
    """Turn labels of any shape and type that people store into int64, one a record.

    Understood are integers and booleans of any width, floating-point numbers that are whole, columns `(n, 1)`, rows
    with a single one (one-hot), and, where `names` are known, text.

    Args:
        values: the array as it was stored.
        where: the split, for error messages.
        names: class names in label order.

    Raises:
        UserError: naming the first value that is no label.
    """
    labels = np.asarray(values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind in "SU" and labels.ndim == 1:
        return _labels_of_text(labels, where, names)
    if labels.dtype.kind not in "biuf":
        raise UserError(f"{where}: labels of the type {labels.dtype} are not read; store integers.")
    if labels.ndim == 2:
        ones = (labels == 1).sum(axis=1) == 1
        if not (ones & ((labels == 0).sum(axis=1) == labels.shape[1] - 1)).all():
            raise UserError(
                f"{where}: labels of the shape {labels.shape} are read only if each row is one-hot."
            )
        return np.argmax(labels, axis=1).astype(np.int64)
    if labels.ndim != 1:
        raise UserError(f"{where}: labels must be one a record, not of the shape {labels.shape}.")
    whole = np.isfinite(labels) & (np.abs(labels.astype(np.float64)) < 2.0**53)
    whole &= np.mod(np.where(whole, labels, 0), 1) == 0
    if not whole.all():
        first = int(np.argmin(whole))
        raise UserError(
            f"{where}: the label of record {first} is {labels[first]}, no whole number."
        )
    return labels.astype(np.int64)


def _labels_of_text(labels: np.ndarray, where: str, names: tuple[str, ...] | None) -> np.ndarray:
    texts = [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in labels]
    if names is None:
        raise UserError(
            f"{where}: labels are text, such as {texts[0]!r}. Put a classes.txt beside the data, one name per line, "
            "whose order gives the numbers."
            if texts
            else f"{where} holds no record."
        )
    label_of = {name: label for label, name in enumerate(names)}
    unknown = next((text for text in texts if text not in label_of), None)
    if unknown is not None:
        raise UserError(f"{where}: the label {unknown!r} is none of the class list's names.")
    return np.asarray([label_of[text] for text in texts], np.int64)


def names_of_labels(
    labels: np.ndarray,
    where: str,
    *,
    stored_names: tuple[str, ...] | None = None,
    classes: ClassList | None = None,
    any_label: bool = False,
) -> tuple[str, ...]:
    """Choose the class names of a split: the class list's, else its own, else as many numbers as there are.

    Args:
        labels: every label of the split.
        where: the split, for the error message.
        stored_names: names stored with the data.
        classes: the class list; overrides `stored_names`.
        any_label: let labels outside the classes pass (a scan lists them).

    Raises:
        UserError: when a label lies outside the classes.
    """
    highest = int(labels.max()) if len(labels) else -1
    names = classes.names if classes else stored_names
    if names is None:
        if highest >= MOST_CLASSES and not any_label:
            raise UserError(
                f"{where} holds the label {highest}, and no class list says that there are so many classes: mend the "
                "label, or put a classes.txt beside the data, one name per line."
            )
        plausible = labels[labels < MOST_CLASSES]
        names = tuple(str(i) for i in range(int(plausible.max(initial=-1)) + 1))
    if any_label or not len(labels):
        return names
    lowest = int(labels.min())
    if highest >= len(names):
        raise UserError(
            f"{where} holds the label {highest}, but the class list names only "
            f"{counted(len(names), 'class', 'classes')}."
        )
    if lowest < 0:
        raise UserError(
            f"{where} holds the label {lowest}, which means none, {int((labels < 0).sum())} times in "
            f"{counted(len(labels), 'record')}, as in a test split whose labels are secret. Use another split."
        )
    return names


def list_for(
    root: Path, class_list: Path | None, stored_names: tuple[str, ...] | None = None
) -> ClassList | None:
    """Read the class list given, or else, where the data have no names of their own, the one in their folder."""
    if class_list:
        return read_class_list(class_list)
    return find_class_list(root) if stored_names is None else None


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
        others = f" (such a label: {len(stray)} of {counted(len(labels), 'record')})"
        raise UserError(
            stray_label(source[first].name, int(labels[first]), len(source.class_names), others)
        )


def stray_label(name: str, label: int, classes: int, others: str = "") -> str:
    """Say what is wrong with a record whose label is no class, and what to do."""
    return (
        f"{name}: the label {label} is outside the {counted(classes, 'class', 'classes')}{others}. "
        "`fastvim data check` lists all such records: mend them, "
        "give the class list that they belong to, or leave this split out (--split)."
    )

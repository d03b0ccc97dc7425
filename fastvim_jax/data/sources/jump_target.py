"""Label JUMP-CP wells by joining JUMP-Target-1's plate map and metadata, as the published models did.

The plate map names each well's reagent (`broad_sample`); the metadata name the gene that the reagent targets. Wells
without a reagent match the metadata's row without one. Class 0 is the negative control (a labelled well without a
gene); the genes follow in alphabetical order. Compounds and CRISPR have 161 classes, ORF 176.

Source: github.com/jump-cellpainting/JUMP-Target (MIT). In November 2024, after the models were published, the compound
metadata renamed `target` to `target_list` (several genes per compound). Use the file of 2021.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastvim_jax.errors import UserError, suggest

CONTROL = "control"
GENE_COLUMNS = {"compound": "target", "crispr": "gene", "orf": "gene"}
MISSING = frozenset({"", "NA", "NaN", "nan"})


@dataclass(frozen=True)
class PlateLabels:
    """Hold the classes and labels of one kind of plate.

    Attributes:
        class_names: "control", then the genes in alphabetical order.
        label_of_well: label by well name, for example "A01". A well that joins no metadata is missing.
        unlabelled: wells of the plate map that join no metadata.
    """

    class_names: tuple[str, ...]
    label_of_well: dict[str, int]
    unlabelled: tuple[str, ...]

    def label(self, well: str) -> int | None:
        """Return the label of a well however its name is padded ("A1", "a01", "A001"), or None if it has none."""
        return self.label_of_well.get(well_name(well))


def read_plate_labels(folder: Path, perturbation: str) -> PlateLabels:
    """Read `JUMP-Target-1_<perturbation>_platemap.tsv` and `..._metadata.tsv`.

    Args:
        folder: holds the four-column tables of JUMP-Target.
        perturbation: "compound", "crispr" or "orf".

    Raises:
        UserError: an unknown perturbation, a missing file or column, or a plate map with one well twice.
    """
    if perturbation not in GENE_COLUMNS:
        raise UserError(
            f"perturbation {perturbation!r} is not one of {', '.join(GENE_COLUMNS)}."
            + suggest(perturbation, GENE_COLUMNS)
        )
    stem = f"JUMP-Target-1_{perturbation}"
    gene = GENE_COLUMNS[perturbation]
    wells = _read_table(folder / f"{stem}_platemap.tsv", ("well_position", "broad_sample"))
    reagents = _read_table(folder / f"{stem}_metadata.tsv", ("broad_sample", gene))
    gene_of = {_known(row["broad_sample"]): _known(row[gene]) for row in reagents}
    names = (CONTROL, *sorted({name for name in gene_of.values() if name}))
    used = {
        gene_of[_known(row["broad_sample"])]
        for row in wells
        if _known(row["broad_sample"]) in gene_of
    }
    names = tuple(name for name in names if name == CONTROL or name in used)
    number = {name: label for label, name in enumerate(names)}
    labels: dict[str, int] = {}
    unlabelled = []
    for row in wells:
        well, reagent = well_name(row["well_position"]), _known(row["broad_sample"])
        if well in labels or well in unlabelled:
            raise UserError(f"{folder / stem}_platemap.tsv names the well {well} twice.")
        if reagent in gene_of:
            labels[well] = number[gene_of[reagent] or CONTROL]
        else:
            unlabelled.append(well)
    return PlateLabels(names, labels, tuple(unlabelled))


def well_name(text: str) -> str:
    """Write a well as one or two letters and a number of at least two digits: "a1" becomes "A01".

    Raises:
        UserError: `text` is no well.
    """
    name = text.strip().upper()
    letters = name.rstrip("0123456789")
    digits = name[len(letters) :]
    if not (1 <= len(letters) <= 2 and letters.isascii() and letters.isalpha() and digits):
        raise UserError(f"{text!r} is no well: expected a letter and a number such as B07.")
    return f"{letters}{int(digits):02}"


def _known(value: str | None) -> str:
    """Return the value, or "" if it is one of the texts that stand for a missing value."""
    value = (value or "").strip()
    return "" if value in MISSING else value


def _read_table(file: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    if not file.is_file():
        raise UserError(
            f"{str(file)!r} does not exist: put the plate maps and metadata of JUMP-Target-1 there "
            "(github.com/jump-cellpainting/JUMP-Target)."
        )
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    found = tuple(rows[0]) if rows else ()
    if missing := [column for column in columns if column not in found]:
        hint = ""
        if "target" in missing and "target_list" in found:
            hint = " This is the table of November 2024; the published models were trained with that of 2021."
        raise UserError(
            f"{str(file)!r} has no column {', '.join(missing)} (found: {', '.join(found) or 'nothing'}).{hint}"
        )
    return rows

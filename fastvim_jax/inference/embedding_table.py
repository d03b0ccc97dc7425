"""Tables of features: write them, average rows by site or well, and normalise them to a plate's controls.

Columns are `Metadata_...` and `feature_0000`, ..., as pycytominer reads them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastvim_jax.data.sources.jump_target import well_name
from fastvim_jax.errors import UserError, counted, require_texts, suggest

PREFIX = "Metadata_"
ADDED = ("channels", "rows", "tile", "tiles")
"""Columns that tables of fields may have beside those that identify a field."""
MAD_TO_DEVIATION = 1.4826
"""Ratio of standard deviation to median absolute deviation in a normal distribution."""


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A table of features.

    Attributes:
        metadata: columns by name, without the prefix; each as long as `features`.
        features: `rows d`, float32.
        problems: fields that could not be embedded, with the reason.
    """

    metadata: dict[str, list[str]]
    features: np.ndarray
    problems: tuple[str, ...] = ()

    def write(self, file: Path) -> None:
        """Write a Parquet or, by its suffix, a CSV file.

        Raises:
            UserError: another suffix, or pyarrow is not installed.
        """
        try:
            import pyarrow
            import pyarrow.csv
            import pyarrow.parquet
        except ImportError:
            raise UserError("tables need pyarrow: pip install 'fastvim-jax[cells]'.") from None
        require_table(file)
        columns: dict[str, Any] = {f"{PREFIX}{key}": value for key, value in self.metadata.items()}
        columns |= {f"feature_{i:04}": column for i, column in enumerate(self.features.T)}
        writers = {".parquet": pyarrow.parquet.write_table, ".csv": pyarrow.csv.write_csv}
        file.parent.mkdir(parents=True, exist_ok=True)
        writers[file.suffix](pyarrow.table(columns), str(file))


def require_table(file: Path) -> None:
    """Raise UserError unless the file's name ends in `.parquet` or `.csv`."""
    if file.suffix not in (".parquet", ".csv"):
        raise UserError(f"{str(file)!r}: write .parquet or .csv.")


def aggregate(table: Embeddings, by: Sequence[str]) -> Embeddings:
    """Average rows that agree in the columns `by`; other columns stay where all rows of a group agree.

    Wells agree however they are written: A1 and A01 are one well, and called A01 where a group has both.

    Raises:
        UserError: none of the columns is there.
    """
    by = require_texts(by, "by")
    keys = [key for key in by if key in table.metadata]
    if not keys:
        raise UserError(
            f"rows cannot be put together by {', '.join(by)}: there are the columns "
            f"{', '.join(table.metadata)}. Name them in --pattern."
        )
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, group in enumerate(_groups_of_rows(table, keys)):
        groups.setdefault(group, []).append(row)
    metadata = []
    for group, rows in groups.items():
        values = {key: {table.metadata[key][row] for row in rows} for key in table.metadata}
        known = {key: next(iter(found)) for key, found in values.items() if len(found) == 1}
        metadata.append(dict(zip(keys, group, strict=True)) | known | {"rows": str(len(rows))})
    features = np.stack([table.features[rows].mean(axis=0) for rows in groups.values()])
    return dataclasses.replace(table, metadata=columns_of(metadata), features=features)


def averaged_over(table: Embeddings, by: Sequence[str]) -> list[str]:
    """List the columns that differ between rows which `by` puts together, but for those that number a well's fields."""
    groups = _groups_of_rows(table, [key for key in by if key in table.metadata])
    expected = {*by, *ADDED, "site", "field", "id", "file"}
    return [
        name
        for name, values in table.metadata.items()
        if name not in expected and len({*zip(groups, values, strict=True)}) > len({*groups})
    ]


def _groups_of_rows(table: Embeddings, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Return each row's values in the columns `keys`, with one name for a well however it is written."""
    columns = [table.metadata[key] for key in keys]
    wells = [map(same_well, c) if k == "well" else c for k, c in zip(keys, columns, strict=True)]
    return list(zip(*wells, strict=True))


def normalise_to_controls(table: Embeddings, controls: Sequence[str]) -> Embeddings:
    """Return (feature - median) / (1.4826 · median absolute deviation), both over the plate's control wells.

    A feature that is constant over the controls is divided by the smallest deviation that is not 0 (by 1, if all are).
    Columns without a plate count as one plate.

    Raises:
        UserError: there is no well, a control is no well of the table, or a plate has fewer than two rows of its
            control wells.
    """
    plates = table.metadata.get("plate", [""] * len(table.features))
    require_controls(table.metadata.get("well", ()), plates, controls)
    wanted = {same_well(well) for well in controls}
    inside = np.array([same_well(well) in wanted for well in table.metadata["well"]])
    features = np.empty_like(table.features)
    for plate in dict.fromkeys(plates):
        rows = np.array([p == plate for p in plates])
        reference = table.features[rows & inside]
        median = np.median(reference, axis=0)
        deviation = MAD_TO_DEVIATION * np.median(np.abs(reference - median), axis=0)
        positive = deviation[deviation > 0]
        deviation = np.where(deviation > 0, deviation, positive.min() if len(positive) else 1.0)
        features[rows] = (table.features[rows] - median) / deviation
    return dataclasses.replace(table, features=features)


def require_controls(wells: Sequence[str], plates: Sequence[str], controls: Sequence[str]) -> None:
    """Check that rows can be normalised to control wells.

    Args:
        wells: well of each row; empty if rows have none.
        plates: plate of each row.
        controls: names of the control wells; A1 and A01 are one well.

    Raises:
        UserError: there is no well, a control is none of the wells, or a plate has fewer than two rows of its control
            wells.
    """
    known = sorted(set(wells))
    if not known:
        raise UserError(
            "controls are wells, but the table has no column well: name it in --pattern."
        )
    found = {same_well(well) for well in known}
    if unknown := [well for well in controls if same_well(well) not in found]:
        raise UserError(
            f"there is no row of the control {', '.join(unknown)}: wells are named {', '.join(known[:5])}"
            f"{', ...' if len(known) > 5 else ''}.{suggest(unknown[0], known)}"
        )
    wanted = {same_well(well) for well in controls}
    counts = Counter(p for p, w in zip(plates, wells, strict=True) if same_well(w) in wanted)
    for plate in dict.fromkeys(plates):
        if counts[plate] < 2:
            raise UserError(
                f"plate {plate!r} has {counted(counts[plate], 'row')} in the wells {', '.join(controls)}: it needs two."
            )


def same_well(name: str) -> str:
    """Return one name for a well however it is written (A1, a01, A001), and any other text as it is."""
    try:
        return well_name(name)
    except UserError:
        return name


def columns_of(rows: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Turn rows into columns; a value that a row lacks is ""."""
    names = dict.fromkeys(key for row in rows for key in row)
    return {name: [row.get(name, "") for row in rows] for name in names}

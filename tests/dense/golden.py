"""The golden files of segmentation and detection: where they are, and how one is read.

The format is that of `tests.parity.golden`: one `.npz` each, with the class that made it in `meta`. A checker takes
one fixture and returns its comparisons; `tests.dense.segmentation` and `tests.dense.detection` map classes to theirs.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.parity.compare import Comparison, in_all_modes
from tests.parity.golden import Golden, read
from tests.support import dense_dir

Checker = Callable[[Golden], list[Comparison]]
"""From a fixture to its comparisons, one for each dtype or mode."""

__all__ = ["Checker", "Golden", "dtypes_of", "fixtures", "read", "table"]


def dtypes_of(golden: Golden) -> tuple[str, ...]:
    """Return float64 and, for a third of the fixtures, drawn anew each run, float32.

    Each dtype is a program to compile, and both run the same code. A fixture that known.py does not name is compared
    in both, and so is each with FASTVIM_PARITY_DTYPES=all.
    """
    drawn = zlib.crc32(f"{os.environ['FASTVIM_TEST_SEED']} {golden.name}".encode()) % 3 == 0
    return ("float64", "float32") if drawn or in_all_modes(golden.name) else ("float64",)


def fixtures() -> dict[Path, str]:
    """Return the class of every fixture, by path; empty where there are no golden numbers."""
    folder = dense_dir()
    return {path: _class_of(path) for path in sorted(folder.glob("*.npz"))} if folder else {}


def table(name: str) -> dict | None:
    """Read the JSON table `name`; return None where it is absent."""
    folder = dense_dir()
    path = folder / name if folder else None
    return json.loads(path.read_text()) if path and path.exists() else None


def _class_of(path: Path) -> str:
    with np.load(path, allow_pickle=False) as archive:
        return json.loads(str(archive["meta"]))["class"]

"""Share among test files: float64, the folders of golden numbers and data, and comparisons of arrays."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import ArrayLike

ROOT = Path(__file__).resolve().parent.parent
# Factor on the number of random inputs: of repeats of tests that draw from `seed`, and of hypothesis's examples.
DRAWS = int(os.environ.get("FASTVIM_TEST_DRAWS", "1"))

# Whether every case of the tests marked `drawn`, and every dtype of the golden numbers, is run.
CASES = os.environ.get("FASTVIM_TEST_CASES", "drawn")
if CASES not in ("drawn", "all"):
    raise ValueError(f"FASTVIM_TEST_CASES={CASES}: use all or drawn")
ALL_CASES = CASES == "all"


def x64() -> contextlib.AbstractContextManager[None]:
    """Turn on double precision inside a `with` block. Functions that were jitted outside are compiled again inside."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # JAX 0.10 has it only here

    return enable_x64()


def _shared(variable: str, name: str) -> Path | None:
    """Return the folder that the environment variable names, else `../shared/<name>`; None if it does not exist."""
    named = os.environ.get(variable)
    folder = Path(named) if named else ROOT.parent / "shared" / name
    if named and not folder.is_dir():
        raise FileNotFoundError(f"{variable}={named} is not a folder")
    return folder if folder.is_dir() else None


def parity_dir() -> Path | None:
    """Find the golden numbers of models: $FASTVIM_PARITY_DIR, default ../shared/parity; None if they are absent."""
    return _shared("FASTVIM_PARITY_DIR", "parity")


def dense_dir() -> Path | None:
    """Find golden numbers of dense models: $FASTVIM_DENSE_DIR, default ../shared/dense, None if absent."""
    return _shared("FASTVIM_DENSE_DIR", "dense")


def data_dir() -> Path | None:
    """Find the small real data sets: $FASTVIM_DATA_DIR, default ../shared/data; None if they are absent."""
    return _shared("FASTVIM_DATA_DIR", "data")


def relative_error(actual: ArrayLike, expected: ArrayLike, name: str = "array") -> float:
    """Return the largest absolute difference divided by the largest entry of `expected` (by 1 if all are zero).

    Raises:
        AssertionError: the shapes differ, or an entry of `actual` or `expected` is not finite.
    """
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape, (
        f"{name}: shape {actual.shape}, expected {expected.shape}"
    )
    assert np.isfinite(expected).all(), f"{name}: the expected values are not finite"
    assert np.isfinite(actual).all(), f"{name}: {(~np.isfinite(actual)).sum()} entries not finite"
    if actual.size == 0:
        return 0.0
    largest = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / (largest if largest > 0 else 1.0))


def assert_close(
    actual: ArrayLike, expected: ArrayLike, rtol_of_max: float, name: str = "array"
) -> float:
    """Assert `relative_error(actual, expected) <= rtol_of_max`, and return it."""
    error = relative_error(actual, expected, name)
    assert error <= rtol_of_max, (
        f"{name}: off by {error:.2e} of the largest entry, more than {rtol_of_max:.0e}"
    )
    return error


def checked(config: Any, **changes: Any) -> Any:
    """Return a copy of a config with changed values, which only the config's own checks have seen.

    A constructor call would not reach them, because in tests beartype checks the constructor's annotations first.
    """
    config = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    config.__post_init__()
    return config


def assert_says_same(script: str, *arguments: Any, devices: int) -> None:
    """Run a Python script with `devices` simulated devices in its own process. It must print "same" and no more."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def read_table(file: Path) -> Any:
    """Read a Parquet or CSV file as a table of pyarrow. Empty cells of text are None."""
    pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    if file.suffix == ".parquet":
        return parquet.read_table(file)
    return csv.read_csv(
        file, convert_options=csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
    )

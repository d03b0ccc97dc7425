"""Every golden file of segmentation and detection: one test each, dispatched on the class that made it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.dense import detection, detection_heads, detection_whole, segmentation
from tests.dense.golden import Checker, fixtures, read
from tests.parity.compare import close

CHECKERS: dict[str, Checker] = {
    **segmentation.CHECKERS,
    **detection.CHECKERS,
    **detection_heads.CHECKERS,
    **detection_whole.CHECKERS,
}
FIXTURES = fixtures()
COVERED = [path for path, kind in FIXTURES.items() if kind in CHECKERS]


@pytest.mark.skipif(not FIXTURES, reason="no golden numbers here: set FASTVIM_DENSE_DIR")
@pytest.mark.parametrize("path", COVERED, ids=[path.stem for path in COVERED])
def test_golden_numbers(path: Path, record_property: Any) -> None:
    golden = read(path)
    close(CHECKERS[golden.kind](golden), record_property)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in COVERED if FIXTURES[path].startswith("CascadeRCNN with")]
)
def test_losses_of_a_whole_detector_in_float32(path: Path, record_property: Any) -> None:
    close([detection_whole.check_training_of_samples(read(path))], record_property)


def test_every_class_has_one_checker() -> None:
    assert not set(segmentation.CHECKERS) & set(detection.CHECKERS)


def test_every_golden_file_is_accounted_for(record_property: Any) -> None:
    if not FIXTURES:
        pytest.skip("no golden numbers here: set FASTVIM_DENSE_DIR")
    others = Counter(kind for kind in FIXTURES.values() if kind not in CHECKERS)
    if others:
        named = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items()))
        line = f"  dense, not yet covered, {others.total()} fixtures: {named}"
        record_property("parity", {"lines": [line]})

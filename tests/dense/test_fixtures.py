"""Every golden file of segmentation and detection: one test each, dispatched on the class that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dense import detection, detection_heads, detection_whole, segmentation
from tests.dense.golden import Checker, fixtures, read
from tests.parity.compare import ASKED, close
from tests.parity.known import KNOWN

CHECKERS: dict[str, Checker] = {
    **segmentation.CHECKERS,
    **detection.CHECKERS,
    **detection_heads.CHECKERS,
    **detection_whole.CHECKERS,
}
ELSEWHERE = {"pycocotools COCOeval": "test_coco.py", "mmengine schedulers": "test_recipes.py"}
"""Classes whose files a module beside this one looks up by the class."""
FIXTURES = fixtures()
COVERED = [path for path, kind in FIXTURES.items() if kind in CHECKERS]
WHOLE = {
    "det_cascade_train",
    "det_cascade_detect_raw",
    "det_cascade_detect_rescaled",
    "det_rpn",
    "seg_model_train",
}


def marks(path: Path) -> tuple[pytest.MarkDecorator, ...]:
    """Draw known fixtures: of the parts of segmentation, of those of detection, and of whole models."""
    if ASKED or path.stem not in KNOWN:
        return ()
    part = "whole model" if path.stem in WHOLE else path.stem.partition("_")[0]
    return (pytest.mark.drawn(f"golden {part}"),)


@pytest.mark.skipif(not FIXTURES, reason="no golden numbers here: set FASTVIM_DENSE_DIR")
@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=marks(path)) for path in COVERED]
)
def test_golden_numbers(path: Path, record_property: Any) -> None:
    golden = read(path)
    close(CHECKERS[golden.kind](golden), record_property)


@pytest.mark.drawn("golden whole model")
@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in COVERED if FIXTURES[path].startswith("CascadeRCNN with")]
)
def test_losses_of_a_whole_detector_in_float32(path: Path, record_property: Any) -> None:
    close([detection_whole.check_training_of_samples(read(path))], record_property)


def test_every_class_has_one_checker() -> None:
    assert not set(segmentation.CHECKERS) & set(detection.CHECKERS)


@pytest.mark.skipif(not FIXTURES, reason="no golden numbers here: set FASTVIM_DENSE_DIR")
def test_every_golden_file_is_compared() -> None:
    """Check that every golden file is compared.

    If this fails, write a checker for the new files' class, or name it in ELSEWHERE with the module that has one.
    """
    assert not {p.name: kind for p, kind in FIXTURES.items() if kind not in {*CHECKERS, *ELSEWHERE}}
    for kind, module in ELSEWHERE.items():
        assert f'kind == "{kind}"' in (Path(__file__).parent / module).read_text()

"""activations="compute" in bfloat16, held to its stated bounds on golden models that have mixers.

The residual stream is float32 or bfloat16 (residual_in_fp32=False, as in the fast mode): the bounds are the same.

Each run draws one model of each class and one of those with maxima, and runs some of these and every model that
known.py does not name, each with one of the two streams. FASTVIM_PARITY_DTYPES=all takes every model with both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.parity.compare import ASKED, close
from tests.parity.golden import draw_representatives, fixture_paths, kind_of, read
from tests.parity.known import KNOWN
from tests.parity.models import compare_model

KINDS = {"FastVim", "FastVimBackbone", "Vim", "VimBackbone"}
MAXIMA = {"fastvim_max", "fastvim_pool_max", "vim_nocls_max"}  # pooled, or taken by the head
QUICK = "fastvim_scale025"
PATHS = [path for path in fixture_paths() if kind_of(path) in KINDS]
STREAMS = {path: (True, False) for path in PATHS}
if ASKED != "all":
    seed = int(os.environ["FASTVIM_TEST_SEED"])
    drawn = draw_representatives(PATHS, seed) | {sorted(MAXIMA)[seed % len(MAXIMA)], QUICK}
    PATHS = [path for path in PATHS if path.stem in drawn or path.stem not in KNOWN]
    STREAMS = {path: (bool((seed + i) % 2),) for i, path in enumerate(PATHS)}


def marks(path: Path) -> tuple[pytest.MarkDecorator, ...]:
    if path.stem == QUICK:
        return ()
    return (pytest.mark.slow, pytest.mark.drawn)[: 2 if path.stem in KNOWN else 1]


@pytest.mark.skipif(not PATHS, reason="no golden numbers here: set FASTVIM_PARITY_DIR")
@pytest.mark.parametrize(
    ("path", "in_fp32"),
    [
        pytest.param(path, in_fp32, id=f"{path.stem}-{in_fp32}", marks=marks(path))
        for path in PATHS
        for in_fp32 in STREAMS[path]
    ],
)
def test_within_stated_bounds(path: Path, in_fp32: bool, record_property: Any) -> None:
    golden = read(path)
    if golden.quirk:
        pytest.skip("documents a path of the reference that no released recipe uses")
    dtype = "bfloat16 compute, max" if path.stem in MAXIMA else "bfloat16 compute"
    close([compare_model(golden, dtype, residual_in_fp32=in_fp32)], record_property)

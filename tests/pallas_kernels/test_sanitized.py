"""The cases that compute-sanitizer runs on a GPU (tests/gpu/test_memory.py) take the kernels: lowered for an H100."""

from __future__ import annotations

import numpy as np

from tests.pallas_kernels.mosaic_support import lower_for_h100, needs_mosaic
from tests.support import CASES


@needs_mosaic
def test_every_case_runs_a_kernel(seed):
    """Lower a fifth of the cases, or all (FASTVIM_TEST_CASES=all), which take 20 s of processor time."""
    from tests.gpu.sanitized import cases

    rng = np.random.default_rng(seed)
    every = list(cases(rng))
    drawn = every if CASES == "all" else [every[i] for i in rng.permutation(len(every))[::5]]
    without = [
        name
        for name, run, *args in drawn
        if "custom_call @mosaic_gpu" not in lower_for_h100(run, *args)
    ]
    assert not without

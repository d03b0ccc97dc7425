"""The kernels under vmap, loops, remat and shard_map on a Hopper GPU, against float64; skipped elsewhere."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels import gpu
from tests.pallas_kernels import compositions
from tests.pallas_kernels.mosaic_support import relative_errors

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
    reason="no GPU that the kernels run on",
)


@pytest.mark.parametrize("channels", [128, 384])
@pytest.mark.parametrize("name", compositions.operations(128))
def test_compositions(seed, name, channels):
    operation = compositions.operations(channels)[name]
    case = compositions.draw(np.random.default_rng(seed), operation)
    wanted = case.wanted()
    for composition, run in compositions.COMPOSITIONS.items():
        program = jax.jit(lambda leaves, run=run: run(case, "auto", leaves))
        compiled = program.lower(case.leaves).compile()
        assert "mosaic_gpu" in compiled.as_text()
        got = jax.device_get(compiled(case.leaves))
        assert max(relative_errors(got, wanted)) < 1e-5, composition

"""activations="compute" keeps its stated bounds through the fused kernels on a real Hopper GPU."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels import gpu
from tests.models.compute_bounds import KINDS, hold_to_bounds

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
    reason="no GPU that the kernels run on",
)


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("kind", KINDS)
def test_within_stated_bounds(kind: str, width: int, rng: np.random.Generator) -> None:
    options = {"scan_implementation": "pallas", "residual_in_fp32": width == 64}
    hold_to_bounds(kind, rng, embed_dim=width, grid=(6, 7), **options)

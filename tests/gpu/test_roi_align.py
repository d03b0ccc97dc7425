"""RoIAlign's kernel on a real GPU; skipped where there is none."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.models.detection import roi_align
from pallas_kernels import gpu
from tests.models.test_detection import extreme_boxes
from tests.pallas_kernels.mosaic_support import relative_errors

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
    reason="no GPU that the kernels run on",
)
STRIDES = (4, 8, 16, 32)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 3e-3)])
@pytest.mark.parametrize("size", [(7, 7), (14, 14)])
def test_kernel_and_gradients(rng, size, dtype, bound):
    """Compare with the gather in float32, for boxes of all sizes and shapes; gradients with those of its own dtype."""
    maps = tuple(
        jnp.asarray(rng.standard_normal((2, 512 // s, 768 // s, 256)), dtype) for s in STRIDES
    )
    boxes = np.stack([extreme_boxes(rng, 100) * [3, 2, 3, 2] for _ in range(2)]).astype(np.float32)
    boxes[0, :2] = [[5, 5, 5, 5], [-30, -20, 800, 530]]
    given = jnp.asarray(boxes)
    pool = partial(roi_align.pool_boxes, strides=STRIDES, size=size)
    gather = partial(roi_align._pool_by_gather, strides=STRIDES, size=size, cells=128 * 192)
    compiled = jax.jit(pool).lower(maps, given).compile()
    assert "roi_align" in compiled.as_text()
    found = compiled(maps, given)
    wide = [x.astype("float32") for x in maps]
    error = max(relative_errors(found, jax.jit(gather)(tuple(wide), given)))
    print(error)
    assert error < bound
    np.testing.assert_array_equal(found, compiled(maps, given))

    def gradients(pool):
        return jax.jit(
            jax.grad(lambda maps: jnp.sum(jnp.cos(pool(maps, given).astype("float32"))))
        )(maps)

    assert max(relative_errors(gradients(pool), gradients(gather))) < 1e-2

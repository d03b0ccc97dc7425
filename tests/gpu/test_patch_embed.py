"""The kernel that embeds patches, and the models that use it, on a real Hopper GPU; skipped where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import gpu
from tests.models import test_fused_ends as ends
from tests.pallas_kernels import test_patch_embed as embed
from tests.pallas_kernels.mosaic_support import relative_errors

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
    reason="no GPU that the kernels run on",
)

# Batch, rows, columns, outputs, patch, channels.
CASES = [
    (128, 14, 14, 192, (16, 16), 3),  # FastVim-T
    (128, 14, 14, 384, (16, 16), 3),
    (128, 14, 14, 768, (16, 16), 3),
    (128, 32, 32, 192, (16, 16), 3),
    (8, 14, 14, 192, (16, 16), 3),  # fewer tiles than processors
    (12, 14, 3, 64, (16, 16), 3),  # 168 lines: tiles overlap
    (18, 4, 5, 128, (2, 16), 1),  # few and short parts
    (8, 9, 5, 128, (5, 16), 16),  # as long as they come
]


@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_kernel(seed, case, stream):
    args = embed.draw(np.random.default_rng(seed), *case)
    compiled = jax.jit(lambda *args: embed.run(args, False, stream)).lower(*args).compile()
    assert "mosaic_gpu" in compiled.as_text()
    # Leave NaN where the results will be.
    b, rows, columns, outputs, *_ = case
    for dtype in ("float32", "bfloat16"):
        poison = [jnp.full((b, rows * columns, outputs), jnp.nan, dtype) for _ in range(8)]
        jax.block_until_ready(poison)
        del poison
    first = jax.device_get(compiled(*args))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = embed.wanted_of(*jax.device_get(args))
    errors = relative_errors(first, wanted[: len(first)])
    print(errors)
    assert errors[0] < (embed.BOUND if stream == "bfloat16" else 1e-5)
    assert max(errors) < embed.BOUND
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(*args)))


def test_under_vmap(seed):
    images, weight, table = embed.draw(np.random.default_rng(seed), *CASES[5])
    one = lambda images, weight: embed.embed_as("bfloat16")(images, weight, table)  # noqa: E731
    args = jnp.stack([images, images[::-1]]), jnp.stack([weight, -weight])
    compiled = jax.jit(jax.vmap(one)).lower(*args).compile()
    assert "mosaic_gpu" in compiled.as_text()
    both = jax.device_get(compiled(*args))
    for i in range(2):
        wanted = jax.device_get(jax.jit(one)(args[0][i], args[1][i]))
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), both, wanted)


@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("width", [64, 384])
def test_model(seed, monkeypatch, in_fp32, width):
    """Compare with the model without kernels, and expect the same results again."""
    graphdef, params = ends.split(seed, embed_dim=width, residual_in_fp32=in_fp32)
    images = ends.images_of(seed)

    def compiled():
        forward = lambda p, x: nnx.merge(graphdef, p)(x)  # noqa: E731
        return jax.jit(forward).lower(params, images).compile()

    program = compiled()
    assert "patch_embed" in program.as_text()
    got = jax.device_get(program(params, images))
    np.testing.assert_array_equal(got, jax.device_get(program(params, images)))
    monkeypatch.setenv("FASTVIM_KERNELS", "off")
    plain = compiled()
    assert "mosaic_gpu" not in plain.as_text()
    assert max(relative_errors(got, jax.device_get(plain(params, images)))) < 2e-2

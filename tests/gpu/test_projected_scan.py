"""Projections and scans as one kernel, and their gradients, on a real Hopper GPU; skipped where there is none.

References are computed in float64 on the CPU of the same machine.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from tests.gpu.test_kernels import both_ways_round
from tests.pallas_kernels import test_known_scan as known
from tests.pallas_kernels import test_projected_scan as projected
from tests.pallas_kernels.mosaic_support import relative_errors

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
    reason="no GPU that the kernels run on",
)

ORDER = 1e-6  # of float32 sums in another order

PROJECTED = [
    (128, 14, 384, 12),
    (127, 14, 384, 12),
    (3, 14, 768, 24),
    (128, 14, 768, 24),
    (5, 14, 512, 48),
    (5, 7, 384, 12),
    (33, 32, 384, 12),
    (2, 64, 128, 4),
    (1, 1, 128, 4),
]


@pytest.mark.parametrize("case", PROJECTED)
def test_projected_scan(seed, case):
    args = projected.draw(np.random.default_rng(seed), *case)
    compiled = jax.jit(lambda a: projected.run(a, "pallas")).lower(args).compile()
    assert "mosaic_gpu" in compiled.as_text()
    # Leave NaN where the results will be.
    jax.block_until_ready([jnp.full(args[0].shape[1:], jnp.nan) for _ in range(8)])
    first = jax.device_get(compiled(args))
    with jax.default_device(jax.devices("cpu")[0]):
        drawn = jax.device_put(args, jax.devices("cpu")[0])
        defined, wanted = projected.defined_of(drawn), projected.wanted_of(drawn)
    assert max(relative_errors(first, defined)) < projected.EXACT
    # Rounded operands change a single token by more where its B and C are nearly orthogonal.
    several = case[0] * case[1] > 1
    assert not several or max(relative_errors(first, wanted)) < projected.BOUND
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(args)))


ROUNDED = [(128, 14, 384), (127, 14, 768, 24), (127, 14, 1536, 48), (5, 9, 256, 20), (3, 64, 384)]


@pytest.mark.parametrize("case", ROUNDED)
def test_projected_scan_of_rounded_tokens(seed, case):
    u, params = projected.draw(np.random.default_rng(seed), *case)
    args = u.astype("bfloat16"), params
    run = jax.jit(lambda a: projected.run(a, "pallas", y_dtype="float32"))
    compiled = run.lower(args).compile()
    assert "mosaic_gpu" in compiled.as_text()
    # Leave NaN where the results will be.
    jax.block_until_ready([jnp.full(u.shape[1:], jnp.nan) for _ in range(8)])
    first = jax.device_get(compiled(args))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = projected.wanted_of_rounded(*jax.device_put(args, jax.devices("cpu")[0]))
    assert max(relative_errors(first, wanted)) < projected.EXACT
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(args)))


@pytest.mark.parametrize("case", [c for c in PROJECTED if c[1] in (14, 7)])
def test_gradients_of_projected_scan(seed, case):
    """Compare outputs and gradients, of which the kernel writes what the gradient reads if there are 14 steps."""
    rng = np.random.default_rng(seed)
    args = projected.draw(rng, *case)
    bars = tuple(jnp.asarray(rng.standard_normal(args[0].shape[1:]), jnp.float32) for _ in "fb")
    run = lambda args, bars: projected.gradients_of(args, "pallas", bars)  # noqa: E731
    compiled = jax.jit(run).lower(args, bars).compile()
    # Leave NaN where the results will be.
    jax.block_until_ready([jnp.full(args[0].shape, jnp.nan) for _ in range(8)])
    first = jax.device_get(compiled(args, bars))
    with jax.default_device(jax.devices("cpu")[0]):
        drawn = jax.device_put((args, bars), jax.devices("cpu")[0])
        wanted = projected.wanted_gradients_of(*drawn)
    errors = relative_errors(first, wanted)
    print(errors)
    assert max(errors) < projected.GRADIENT_BOUND
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(args, bars)))


KNOWN = [
    (128, 14, 384, 16),
    (128, 14, 768, 32),
    (8, 8, 384, 16),
    (64, 13, 384, 32),
    (320, 9, 768, 16),
]


@pytest.mark.parametrize("case", KNOWN)
def test_gradients_of_known_scan(seed, case):
    """Compare gradients around results that the kernel kept; with one to 45 tiles of 64 tokens."""
    args, bars = known.draw(np.random.default_rng(seed), *case)
    run = lambda args, bars: known.gradients_of(args, "pallas", bars)  # noqa: E731
    compiled = jax.jit(run).lower(args, bars).compile()
    assert all(kernel in compiled.as_text() for kernel in known.KERNELS)
    # Leave NaN where the results will be.
    jax.block_until_ready([jnp.full(args[0].shape, jnp.nan) for _ in range(8)])
    first = jax.device_get(compiled(args, bars))
    with jax.default_device(jax.devices("cpu")[0]):
        drawn = jax.device_put((args, bars), jax.devices("cpu")[0])
        wanted = projected.wanted_gradients_of(*drawn)
    errors = relative_errors(first, wanted)
    print(errors)
    assert max(errors) < known.BOUND
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(args, bars)))


def written_and_summed(result):
    """Split a result into what kernels write, and the parameters' gradients, which XLA sums over shares."""
    outputs, ((of_tokens, of_params),) = result
    return (outputs, of_tokens), of_params


def check_equal_but_for_order(got, wanted):
    """Compare exactly what kernels write. Compare sums by norm, because XLA adds in another order under vmap."""
    (got_written, got_summed), (written, summed) = map(written_and_summed, (got, wanted))
    jax.tree.map(np.testing.assert_array_equal, got_written, written)
    errors = relative_errors(got_summed, summed)
    print(errors)
    assert max(errors) < ORDER


def test_gradients_of_known_scan_under_vmap(seed):
    (u, params), bars = known.draw(np.random.default_rng(seed), 64, 8, 384)
    run = lambda u: known.gradients_of((u, params), "pallas", bars)  # noqa: E731
    both = jax.device_get(jax.jit(jax.vmap(run))(both_ways_round(u)))
    for i, turn in enumerate((1, -1)):
        wanted = jax.device_get(jax.jit(run)(u[::turn]))
        check_equal_but_for_order(jax.tree.map(lambda x, i=i: x[i], both), wanted)


def test_projected_scan_under_vmap(seed):
    u, params = projected.draw(np.random.default_rng(seed), 3, 14, 384)
    run = lambda u: projected.run((u, params), "pallas")  # noqa: E731
    both = jax.device_get(jax.jit(jax.vmap(run))(both_ways_round(u)))
    for i, turn in enumerate((1, -1)):
        wanted = jax.device_get(jax.jit(run)(u[::turn]))
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), both, wanted)

"""Both directions' scans in one launch on a real Hopper GPU; skipped where there is none.

References are computed in float64 on the CPU of the same machine.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from tests.gpu.test_kernels import on_cpu_in_float64
from tests.pallas_kernels import test_bidirectional_scan as pair
from tests.pallas_kernels.mosaic_support import relative_errors

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
    reason="no GPU that the kernels run on",
)

CASES = [
    {"b": 128, "l": 14, "e": 384, "n": 16},
    {"b": 1, "l": 14, "e": 384, "n": 16},
    {"b": 2, "l": 128, "e": 768, "n": 16, "dtype": "bfloat16"},
    {"b": 50, "l": 40, "e": 384, "n": 16},  # two channels per lane
    {"b": 2, "l": 37, "e": 24, "n": 16},
    {"b": 2, "l": 65, "e": 96, "n": 16, "g": 3},
    {"b": 1, "l": 50, "e": 64, "n": 64},
    {"b": 1, "l": 2500, "e": 392, "n": 16},  # time is split
    None,
    None,
]


@pytest.mark.parametrize("case", CASES)
def test_both_directions(seed, case):
    rng = np.random.default_rng(seed)
    if case is None:
        case = {
            k: int(rng.integers(1, top)) for k, top in (("b", 5), ("l", 100), ("e", 500), ("n", 33))
        }
    print(case)
    args = pair.draw(rng, **case)
    cotangents = pair.of_output(rng, args)
    run = jax.jit(lambda a, c: pair.values_and_gradients(a, c, "auto"))
    compiled = run.lower(args, cotangents).compile()
    assert "mosaic_gpu" in compiled.as_text()
    wanted = on_cpu_in_float64(
        lambda a, c: pair.values_and_gradients(a, c, "xla_sequential"), args, cotangents
    )
    first = jax.device_get(compiled(args, cotangents))
    assert max(relative_errors(first, wanted)) < (1e-2 if "dtype" in case else 1e-5)
    again = jax.device_get(compiled(args, cotangents))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize("batch", [1, 128])
def test_bidirectional_scan_equals_two_scans(seed, batch):
    """Compare with two scans: each direction runs the code of a launch of its own."""
    rng = np.random.default_rng(seed)
    args = pair.draw(rng, batch, 14, 384, 16)
    cotangents = pair.of_output(rng, args)
    together, alone = (
        jax.jit(lambda a, c, f=f: f(a, c, "pallas"))(args, cotangents)
        for f in (pair.values_and_gradients, pair.one_by_one)
    )
    assert max(relative_errors(together, alone)) < 1e-6


def test_the_gradient_of_a_shared_output(seed):
    """Compute gradients of a shared output, as in a mixer, where both outputs' gradients are one array."""
    rng = np.random.default_rng(seed)
    args = pair.draw(rng, 4, 14, 384, 16)

    def loss(args, implementation):
        first, second = pair.bidirectional_scan(**args, implementation=implementation)
        return jnp.sum((first + second) ** 2)

    got, wanted = (
        jax.jit(jax.grad(loss), static_argnums=1)(args, name) for name in ("auto", "xla")
    )
    assert max(relative_errors(got, wanted)) < 1e-5

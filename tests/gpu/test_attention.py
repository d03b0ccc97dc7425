"""cuDNN's attention, as the ViTs use it in half precision, against XLA's; skipped where there is no GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.layers.attention import attend
from fastvim_jax.precision import Precision
from tests.support import x64

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


@pytest.mark.parametrize("tokens", [64, 65, 197])
def test_attention_and_gradients(rng, tokens):
    q, k, v, out_bar = (
        jnp.asarray(rng.standard_normal((3, tokens, 3, 64)), jnp.bfloat16) for _ in range(4)
    )
    run = lambda q, k, v: attend(q, k, v, Precision(dtype="bfloat16"))  # noqa: E731
    program = jax.jit(lambda *a: jax.vjp(run, *a[:3])[1](a[3])).lower(q, k, v, out_bar)
    assert "cudnn" in program.as_text()
    actual = (jax.jit(run)(q, k, v), *program.compile()(q, k, v, out_bar))
    with jax.default_device(jax.devices("cpu")[0]), x64():
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, out_bar)]
        exact = lambda q, k, v: attend(q, k, v, Precision("float64", "float64"))  # noqa: E731
        out, pull = jax.vjp(exact, *wide[:3])
        expected = jax.device_get((out, *pull(wide[3])))
    for one, other in zip(actual, expected, strict=True):
        error = np.abs(np.asarray(one, np.float64) - other).max() / np.abs(other).max()
        assert error < 2e-2

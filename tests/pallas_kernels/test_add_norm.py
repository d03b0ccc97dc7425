"""`add_norm`, residual sum and norm behind any mixer: against plain JAX, with gradients, and lowered for an H100."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mixer_core import add_norm, add_norm_unsupported
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)

pytestmark = needs_mosaic


def draw(rng, shape, drops: bool):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    keep = jnp.asarray(rng.choice([0.0, 1.25], shape[0]), jnp.float32) if drops else None
    return normal(*shape).astype("bfloat16"), normal(*shape), normal(shape[2]), keep


def value_and_gradients(update, residual, gain, keep):
    out, pull = jax.vjp(lambda *args: add_norm(*args, keep=keep), update, residual, gain)
    return out, pull(jax.tree.map(jnp.cos, out))


def plain(update, residual, gain, keep):
    factor = 1.0 if keep is None else keep[:, None, None]
    total = residual + update.astype("float32") * factor
    normed = total * jax.lax.rsqrt(jnp.mean(total**2, axis=-1, keepdims=True) + 1e-6) * gain
    return total, normed.astype(update.dtype)


@pytest.mark.parametrize("drops", [False, True])
def test_equals_plain_jax(seed, drops):
    """Compare value and gradients, traced for an H100 and run on this CPU, where XLA takes the kernels' place."""
    args = draw(np.random.default_rng(seed), (4, 3, 128), drops)
    with abstract_h100():
        got = jax.jit(value_and_gradients).trace(*args).lower().compile()(*args)
    out, pull = jax.vjp(lambda *three: plain(*three, args[3]), *args[:3])
    wanted = out, pull(jax.tree.map(jnp.cos, out))
    assert max(relative_errors(got, wanted)) < 1e-2


@pytest.mark.parametrize(
    ("shape", "reason"), [((4, 3, 128), None), ((1, 3, 128), "3 tokens"), ((4, 3, 64), "64")]
)
def test_what_runs_as_kernels(shape, reason):
    args = draw(np.random.default_rng(0), shape, False)
    text = lower_for_h100(value_and_gradients, *args)
    for kernel in ("mixer_sum_norm", "mixer_norm_gradient"):
        assert launches(text, kernel) == (reason is None)
    with abstract_h100():
        found = add_norm_unsupported(*args[:2])
    assert found is None if reason is None else reason in str(found)

"""A mixer whose core is the fused one gives what the plain form gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.layers.fused_core import fused_core, runs_fused
from fastvim_jax.layers.mixer import Mixer, MixerConfig
from fastvim_jax.layers.pooling import GridPooling
from fastvim_jax.precision import Precision
from pallas_kernels import gpu
from tests.pallas_kernels.mosaic_support import needs_mosaic, relative_errors

pytestmark = needs_mosaic


def test_grid(key, rng, monkeypatch):
    """On this CPU the fused core's stages are XLA's, derivative rule included."""
    method = str(rng.choice(["mean", "max"]))
    pooling = GridPooling(3, 4, transposed=True, method=method, scale=0.25)
    mixer = Mixer(MixerConfig(64), rngs=nnx.Rngs(key))
    graphdef, params = nnx.split(mixer)
    h = jax.random.normal(key, (2, 12, 64))

    def run(params, h):
        out, pull = jax.vjp(lambda p, h: nnx.merge(graphdef, p)(h, pooling), params, h)
        return out, pull(jnp.cos(out))

    assert not runs_fused(mixer, pooling)
    wanted = jax.jit(run)(params, h)
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    assert runs_fused(mixer, pooling)
    got = jax.jit(lambda *args: run(*args))(params, h)
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.parametrize(("method", "dtype"), [("mean", jnp.bfloat16), ("max", jnp.float32)])
def test_only_what_means_lead_to_is_rounded(key, monkeypatch, method, dtype):
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    mixer = Mixer(MixerConfig(64, precision=Precision("bfloat16")), rngs=nnx.Rngs(key))
    pooling = GridPooling(3, 4, method=method)
    xz = jnp.zeros((1, 12, 4 * 64))
    assert jax.eval_shape(lambda xz: fused_core(mixer, xz, pooling), xz).dtype == dtype

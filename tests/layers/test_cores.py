"""On a CPU of several cores a mixer projects its halves apart, and computes what it computes on one core."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.layers import cores, mixer
from fastvim_jax.layers.direction import MixerConfig
from fastvim_jax.layers.pooling import GridPooling, NoPooling
from fastvim_jax.precision import Precision
from pallas_kernels import gpu
from tests.support import x64

WIDTH, INNER = 6, 12


@pytest.mark.parametrize("pooling", [GridPooling(2, 3, transposed=True), NoPooling(6)])
@pytest.mark.parametrize("proj_bias", [False, True])
def test_halves_projected_apart_give_what_one_product_gives(rng, monkeypatch, pooling, proj_bias):
    with x64():
        precision = Precision(dtype="float64", param_dtype="float64")
        config = MixerConfig(width=WIDTH, proj_bias=proj_bias, precision=precision)
        graphdef, params = nnx.split(mixer.Mixer(config, rngs=nnx.Rngs(0)))
        params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params)
        h, weights = (jnp.asarray(rng.normal(size=(2, 6, WIDTH))) for _ in range(2))
        results = []
        for count in (1, 2):
            monkeypatch.setattr(mixer, "program_cores", lambda count=count: count)
            run = jax.jit(lambda params, h: nnx.merge(graphdef, params)(h, pooling))
            found, pull = jax.vjp(run, params, h)
            results.append((found, *pull(weights)))
            text = str(jax.make_jaxpr(run)(params, h))
            assert (f"f64[2,6,{2 * INNER}]" in text) == (count == 1)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_a_program_beside_others_has_one_core(monkeypatch):
    monkeypatch.setattr(cores, "local_cores", lambda: 4)
    assert cores.program_cores() == 4
    with cores.one_core():
        assert cores.program_cores() == 1
    assert cores.program_cores() == 4
    monkeypatch.setattr(cores, "local_cores", lambda: 0)  # Programs for other devices.
    with cores.one_core():
        assert cores.program_cores() == 0


def test_programs_for_other_devices_have_no_local_cores(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert cores.local_cores() > 0
    with gpu.kernels_off():  # a portable program
        assert cores.local_cores() == 0
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert cores.local_cores() == 0

"""A mixer whose core is the fused one gives what the plain form gives."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.layers.channel_pooling import channel_poolings
from fastvim_jax.layers.direction import MixerConfig, stack_directions
from fastvim_jax.layers.fused_core import runs_fused, unsupported
from fastvim_jax.layers.fused_scans import scans_of
from fastvim_jax.layers.mixer import Mixer, stack_mixer_directions
from fastvim_jax.layers.pooling import GridPooling, NoPooling
from fastvim_jax.precision import Precision
from pallas_kernels import gpu
from pallas_kernels.derivatives import nothing_differentiated
from pallas_kernels.mixer_core import sequence_core
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    needs_mosaic,
    relative_errors,
)

pytestmark = needs_mosaic


GRID = GridPooling(3, 4, transposed=True, method="mean", scale=0.25)
MAXIMA = dataclasses.replace(GRID, method="max")
EXACT, NARROW = Precision(), Precision("bfloat16", activations="compute")


def value_and_gradients(graphdef, pooling):
    def run(params, h):
        out, pull = jax.vjp(lambda p, h: nnx.merge(graphdef, p)(h, pooling), params, h)
        return out, pull(jnp.cos(out))

    return jax.jit(run)


def test_the_gradient_of_pooled_scans_keeps_no_step_sizes(key):
    """Compare both forms of the scans. The one for gradients keeps u and nothing else of u's size."""
    mixer = Mixer(MixerConfig(16, precision=NARROW), rngs=nnx.Rngs(key))
    params, scans = scans_of(stack_directions(mixer.forward, mixer.backward, axis=0), skip=False)
    u = jax.random.normal(key, (2, 3, 8, 32))
    with nothing_differentiated():  # the other form
        plain = jax.vjp(scans, params, u)
    pulled = [jax.vjp(scans, params, u), plain]
    kept = [sum(leaf.shape == u.shape for leaf in jax.tree.leaves(pull)) for _, pull in pulled]
    assert kept[0] == 1 < kept[1]
    got, wanted = ((y, pull(tuple(map(jnp.cos, y)))) for y, pull in pulled)
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize(
    ("poolings", "precision"),
    [([GRID, MAXIMA], EXACT), ([NoPooling(12)], EXACT), ([NoPooling(12)], NARROW)],
    ids=["pooled", "unpooled", "unpooled, narrow"],
)
def test_same_function(key, rng, monkeypatch, poolings, precision):
    """Compare the fused core, whose stages are XLA's on this CPU, with the plain mixer, derivative rule included."""
    pooling = poolings[rng.integers(len(poolings))]
    mixer = Mixer(MixerConfig(64, precision=precision), rngs=nnx.Rngs(key))
    graphdef, params = nnx.split(mixer)
    h = jax.random.normal(key, (2, 12, 64))
    assert not runs_fused(mixer.config, pooling)
    wanted = value_and_gradients(graphdef, pooling)(params, h)
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    assert runs_fused(mixer.config, pooling)
    got = value_and_gradients(graphdef, pooling)(params, h)
    assert max(relative_errors(got, wanted)) < (1e-5 if precision is EXACT else 2e-2)


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize("pool_axes", ["alternate", "two_axes"])
def test_channel_grids_as_lines(key, rng, monkeypatch, pool_axes):
    """Run all poolings of a cycle: of tokens in stored order, of columns in place, and of tokens brought into order."""
    channels, method = int(rng.integers(2, 4)), str(rng.choice(["mean", "max"]))
    poolings = channel_poolings(
        (3, 2), channels, scan_order="channel", pool_axes=pool_axes, method=method, scale=0.5
    )
    mixer = Mixer(MixerConfig(16, state_size=2), rngs=nnx.Rngs(key))
    graphdef, params = nnx.split(mixer)
    h = jax.random.normal(key, (2, 6 * channels, 16))

    def run(params, h):
        mixer = nnx.merge(graphdef, params)
        return sum(jnp.sum(jnp.cos(mixer(h, p)) * (i + 1)) for i, p in enumerate(poolings))

    wanted = jax.jit(jax.value_and_grad(lambda *args: run(*args), (0, 1)))(params, h)
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    assert all(runs_fused(mixer.config, pooling) for pooling in poolings)
    got = jax.jit(jax.value_and_grad(lambda *args: run(*args), (0, 1)))(params, h)
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.slow
def test_unpooled_through_every_kernel(key, monkeypatch):
    """Run the unpooled mixer through every kernel in the interpreter, scans included."""

    graphdef, params = nnx.split(Mixer(MixerConfig(64, state_size=4), rngs=nnx.Rngs(key)))
    h = jax.random.normal(key, (1, 9, 64))
    wanted = value_and_gradients(graphdef, NoPooling(9))(params, h)
    config = MixerConfig(64, state_size=4, scan_implementation="pallas")
    graphdef = nnx.graphdef(Mixer(config, rngs=nnx.Rngs(key)))
    with_kernels = functools.partial(sequence_core, implementation="pallas")
    monkeypatch.setattr("fastvim_jax.layers.fused_core.sequence_core", with_kernels)
    with abstract_h100(), interpreted():
        run = value_and_gradients(graphdef, NoPooling(9)).trace(params, h).lower().compile()
        got = run(params, h)
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize(
    ("pooling", "options"),
    [
        (GRID, {"unpool": "after_skip", "conv_bias": False, "post_norm": "rms"}),
        (NoPooling(12), {"conv_bias": False, "post_norm": "none"}),
    ],
    ids=["pooled", "unpooled"],
)
def test_options_that_are_data(key, rng, monkeypatch, pooling, options):
    """Compare options that become data: the skip of pooled tokens moves into the scans.

    A missing bias is a bias of zeros, and so is a norm's missing shift.
    """
    mixer = Mixer(MixerConfig(64, **options), rngs=nnx.Rngs(key))
    for side in (mixer.forward, mixer.backward):
        side.D[...] = jnp.asarray(rng.standard_normal(128), jnp.float32)
    graphdef, params = nnx.split(mixer)
    h = jax.random.normal(key, (2, 12, 64))
    wanted = value_and_gradients(graphdef, pooling)(params, h)
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    assert runs_fused(mixer.config, pooling)
    got = value_and_gradients(graphdef, pooling)(params, h)
    assert max(relative_errors(got, wanted)) < 1e-5


def test_what_does_not_run_fused(key, monkeypatch):
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    for options, reason in (({"conv_width": 0}, "conv_width=0"),):
        mixer = Mixer(MixerConfig(64, **options), rngs=nnx.Rngs(key))
        for pooling in (GRID, NoPooling(12)):
            assert unsupported(mixer.config, pooling) == reason
            assert not runs_fused(mixer.config, pooling)
    attention = dataclasses.replace(GRID, method="attention")
    assert unsupported(MixerConfig(64), attention) == "pooling by attention"


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize(
    ("pooling", "dtype"),
    [(GRID, jnp.bfloat16), (MAXIMA, jnp.float32), (NoPooling(12), jnp.float32)],
)
def test_only_what_means_lead_to_is_rounded(key, monkeypatch, pooling, dtype):
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    mixer = Mixer(MixerConfig(64, precision=Precision("bfloat16")), rngs=nnx.Rngs(key))
    xz = jnp.zeros((1, 12, 4 * 64))
    assert jax.eval_shape(lambda xz: mixer.core(xz, pooling), xz).dtype == dtype


@pytest.mark.drawn("models on kernels", one_in=20)
@pytest.mark.parametrize(
    ("width", "precision", "columns", "rows"),
    [
        (64, EXACT, 36, 4),
        (96, EXACT, 40, 8),
        (64, NARROW, 48, 48),
        (192, NARROW, 48, 48),
        (128, NARROW, 48, 48),
    ],
)
def test_joined_directions_fill_up_the_rank(key, width, precision, columns, rows):
    """Fill the rank up to rows of whole 16 bytes, and to 16 where one kernel writes what narrow products read whole.

    The directions' selected B, C and Δ and their gradients stay the same.
    """
    config = MixerConfig(width, precision=precision)
    mixers = nnx.vmap(lambda key: Mixer(config, rngs=nnx.Rngs(key)))(jax.random.split(key, 3))
    graphdef, params = nnx.split(mixers)
    u = jax.random.normal(key, (2, 5, config.inner), precision.compute)

    def apart(params):
        def select(p):
            mixer = nnx.merge(graphdef, p)
            return [side.select(u) for side in (mixer.forward, mixer.backward)]

        return jax.tree.leaves(jax.vmap(select)(params))

    def joined(params):
        both = stack_mixer_directions(nnx.merge(graphdef, params)).both
        assert both.x_proj.kernel.shape[-1] == columns
        assert both.dt_proj.kernel.shape[-2] == rows
        graph, together = nnx.split(both)
        out = jax.vmap(jax.vmap(lambda p: nnx.merge(graph, p).select(u)))(together)
        return [a[:, 0] for a in out] + [a[:, 1] for a in out]

    wanted, pull_apart = jax.vjp(apart, params)
    got, pull_joined = jax.vjp(joined, params)
    tolerance = 1e-5 if precision is EXACT else 2e-2
    assert max(relative_errors(got, wanted)) < tolerance
    gradients = [
        [
            side[name].kernel[...]
            for side in (g.forward, g.backward)
            for name in ("x_proj", "dt_proj")
        ]
        for g in (pull([jnp.cos(a) for a in wanted])[0] for pull in (pull_joined, pull_apart))
    ]
    assert max(relative_errors(*gradients)) < tolerance

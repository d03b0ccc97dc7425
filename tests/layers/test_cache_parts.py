"""A batch that is run in parts gives what it gives as a whole, and so do its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax.layers import cache_parts
from fastvim_jax.models import VisionMambaConfig, build_model
from tests.support import x64


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_parts_of_a_batch_give_the_same(rng, monkeypatch, pooling):
    if jax.device_count() > 1:
        pytest.skip("several devices share out a batch")
    config = VisionMambaConfig(
        image_size=8, patch_size=4, embed_dim=8, depth=2, num_classes=3, pooling=pooling,
        dtype="float64", param_dtype="float64",
    )  # fmt: skip
    with x64():
        _compare(config, rng, monkeypatch)


def _compare(config, rng, monkeypatch):
    graphdef, params = nnx.split(build_model(config, rngs=nnx.Rngs(0)))
    images = jnp.asarray(rng.normal(size=(6, 8, 8, 3)))
    weights = jnp.asarray(rng.normal(size=(6, 3)))

    def call(entries):
        monkeypatch.setattr(cache_parts, "CACHE_ENTRIES", entries)
        monkeypatch.setattr(cache_parts.os, "sched_getaffinity", lambda _: range(1))
        forward = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
        loss = lambda *args: jnp.sum(weights * forward(*args))  # noqa: E731
        text = str(jax.make_jaxpr(forward)(params, images))
        return (
            text.count("platform_index"),
            jax.jit(forward)(params, images),
            jax.jit(jax.grad(loss, argnums=(0, 1)))(params, images),
        )

    parts = call(2 * 4 * 16)  # Two images of four tokens, 16 channels wide.
    whole = call(1 << 20)
    assert parts[0] > whole[0]
    for found, wanted in zip(jax.tree.leaves(parts[1:]), jax.tree.leaves(whole[1:]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "entries", "size"), [(16, 75264, 2), (16, 1, 16), (7, 1 << 18, 1)]
)
def test_parts_are_equal_and_fit_a_core(monkeypatch, batch, entries, size):
    monkeypatch.setattr(cache_parts.jax, "device_count", lambda: 1)
    monkeypatch.setattr(cache_parts.os, "sched_getaffinity", lambda _: range(1))
    assert cache_parts._images_at_once(batch, entries) == size
    monkeypatch.setattr(cache_parts.jax, "device_count", lambda: 8)
    assert cache_parts._images_at_once(batch, entries) == batch

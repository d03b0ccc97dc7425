"""Which attention runs where: cuDNN's or XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from fastvim_jax.layers import attention
from fastvim_jax.precision import Precision
from pallas_kernels import gpu


@pytest.mark.parametrize(
    ("capabilities", "width", "cudnn"),
    [
        ((9.0,), 64, True),
        ((9.0,), 256, True),
        ((8.0,), 128, True),
        ((8.0,), 256, False),
        ((9.0,), 20, False),
        ((7.5,), 64, False),
        ((0.0,), 64, False),  # another maker's GPU
        ((), 64, False),
    ],
)
def test_cudnn_where_it_takes_the_heads(monkeypatch, capabilities, width, cudnn):
    monkeypatch.setattr(gpu, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(attention, "_attend_on_gpu", lambda q, k, v: 7 * q)
    q = jnp.ones((1, 2, 1, width), jnp.bfloat16)
    out = attention.attend(q, q, q, Precision("bfloat16"))
    assert jnp.all(out == (7 if cudnn else 1))


@pytest.mark.parametrize("default", ["cpu", "the first cpu"])
def test_xla_for_a_program_of_the_cpu_beside_a_gpu(monkeypatch, default):
    monkeypatch.setattr(gpu, "_capabilities", lambda: (9.0,))
    monkeypatch.setattr(attention, "_attend_on_gpu", lambda q, k, v: 7 * q)
    q = jnp.ones((1, 2, 1, 64), jnp.bfloat16)
    with jax.default_device("cpu" if default == "cpu" else jax.devices("cpu")[0]):
        assert jnp.all(attention.attend(q, q, q, Precision("bfloat16")) == 1)
    assert jnp.all(attention.attend(q, q, q, Precision("bfloat16")) == 7)

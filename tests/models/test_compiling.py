"""Forward programs on a CPU are compiled with options that this XLA knows, and only for float32 products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from fastvim_jax.models import compiling
from pallas_kernels import timing

FLOAT32 = jnp.dtype("float32")


@pytest.fixture(autouse=True)
def fresh():
    compiling._known.cache_clear()
    yield
    compiling._known.cache_clear()


def test_float32_products_leave_ynnpack():
    options = compiling.forward_options(FLOAT32)
    if options is None or not any("ynn" in name for name in options):
        pytest.skip("this XLA does not know the option")
    x, y = jnp.ones((64, 32)), jnp.ones((32, 16))
    program = timing.Program(jnp.matmul, x, y, compiler_options=options)
    assert "ynn_fusion" not in program.compiled.as_text()
    assert (program(x, y) == 32).all()
    assert compiling.forward_options(jnp.dtype("bfloat16")) is None


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    width = {"xla_cpu_prefer_vector_width": "512"}
    monkeypatch.setattr(compiling, "_OPTIONS", {"xla_no_such_option": "1"} | width)
    assert compiling.forward_options(FLOAT32) == width
    monkeypatch.setattr(compiling, "_OPTIONS", {"xla_no_such_option": "1"})
    assert compiling.forward_options(FLOAT32) is None


def test_programs_for_gpus_have_no_such_options(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiling.forward_options(FLOAT32) is None

"""The Triton scan without a GPU: in Triton's interpreter against float64, where the extra `triton` is installed."""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selective_scan import reference
from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions
from tests.pallas_kernels.mosaic_support import relative_errors
from tests.support import x64

if jax.default_backend() != "cpu":
    pytest.skip("on a GPU, tests/gpu/test_triton.py runs the kernels", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported.
pytest.importorskip(
    "jax_triton", reason="jax-triton, or JAX for CUDA, is not installed", exc_type=ImportError
)

from triton.runtime.interpreter import GridExecutor

from pallas_kernels.selective_scan import triton

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class Pointer:
    """An array as Triton's interpreter takes it."""

    def __init__(self, x: np.ndarray):
        self.x, self.dtype = x, DTYPES[str(x.dtype)]

    def data_ptr(self) -> int:
        return self.x.ctypes.data


class Executor(GridExecutor):
    """Triton's interpreter without its copies between a device and the host, for which it wants PyTorch's tensors."""

    def _init_args_hst(self, args_dev, kwargs):
        return args_dev, kwargs

    def _restore_args_dev(self, *args):
        pass


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Run the kernels in Triton's interpreter, on the CPU. Outputs start as NaN."""

    def call(*operands, kernel, grid, num_warps, num_stages, **options):
        outs = [np.full(s.shape, np.nan, s.dtype) for s in options.pop("out_shape")]
        arrays = [x if isinstance(x, int) else Pointer(np.array(x)) for x in operands]
        run = Executor(kernel.rewrite(), kernel.arg_names, grid)
        run(*arrays, *map(Pointer, outs), **options)
        return [jnp.asarray(x) for x in outs]

    monkeypatch.setattr(triton.jax_triton, "triton_call", call)


def draw(rng, b, l, e, n, g=1, dtype="float32", drop=()) -> ScanInputs:
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    streamed = lambda *shape: normal(*shape).astype(dtype)  # noqa: E731
    whole = ScanInputs(
        u=streamed(b, l, e), delta=streamed(b, l, e) - 1, A=-jnp.exp(normal(e, n)),
        B=streamed(b, l, g, n), C=streamed(b, l, g, n), D=normal(e), z=streamed(b, l, e),
        delta_bias=normal(e), initial_state=normal(b, e, n),
    )  # fmt: skip
    return whole._replace(**dict.fromkeys(drop))


CASES = [
    {"b": 1, "l": 1, "e": 1, "n": 1},
    {"b": 2, "l": 11, "e": 35, "n": 3},
    {"b": 1, "l": 16, "e": 64, "n": 2, "g": 2, "drop": ("initial_state",)},
    {"b": 1, "l": 13, "e": 5, "n": 4, "dtype": "bfloat16", "drop": ("z", "D")},
    {"b": 2, "l": 32, "e": 3, "n": 2, "parts": 4},
    {"b": 1, "l": 9, "e": 3, "n": 2, "drop": ("delta_bias", "initial_state"), "softplus": False},
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(seed, case, reverse, monkeypatch):
    rng, case = np.random.default_rng(seed), dict(case)
    parts = case.pop("parts", 1)
    softplus = case.pop("softplus", True)
    inputs = draw(rng, **case)
    b, l, e, n = (case[k] for k in "blen")
    dtype = case.get("dtype", "float32")
    if not softplus:  # steps are then the numbers themselves
        inputs = inputs._replace(delta=jnp.abs(inputs.delta))
    chunk = triton.chunk_length(inputs)
    options = ScanOptions(softplus, reverse, True, chunk, True)
    y_bar = jnp.asarray(rng.standard_normal((b, l, e)), dtype)
    last_bar = jnp.asarray(rng.standard_normal((b, e, n)), jnp.float32)
    if parts > 1:
        monkeypatch.setattr(triton, "SHORTEST_PART", l // chunk // parts)
    assert triton._parts(inputs, options) == parts
    y, last, entering = triton._forward(inputs, options)
    assert (entering is None) == (math.ceil(l / chunk) == 1)
    got = triton._backward(inputs, options, entering, y_bar, last_bar)
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), inputs)
        bars = [jnp.asarray(np.asarray(x, np.float64)) for x in (y_bar, last_bar)]
        wanted, pull = jax.vjp(lambda x: reference.scan(x, options), wide)
        (gradients,) = pull(tuple(bars))
    bound = 1e-2 if dtype == "bfloat16" else 1e-5
    errors = relative_errors((y, last, got), (*wanted, gradients))
    assert max(errors) < bound, errors

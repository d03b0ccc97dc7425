"""Measures every implementation of the scan, forward and with all its gradients, against the reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu, timing
from pallas_kernels.selective_scan import mamba_ssm
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.arg_specs import LENGTHS, TARGETS, ScanSpec, of_length
from pallas_kernels.selective_scan.chunks import chunk_length
from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions

IMPLEMENTATIONS = ("pallas", "triton", "xla_associative", "xla_sequential", "mamba_ssm")
TOLERANCES = {
    "float32": 1e-4,
    "bfloat16": 2e-2,
}  # of any array, relative; bfloat16's results are rounded once

# Per step, state and channel. Forward: exponential and its argument, two products and a sum for the state, a product
# and a sum for y. The gradient computes the state again and does about twice that.
OPERATIONS = {False: 7, True: 26}
EXPONENTIALS = {False: 1, True: 3}
TENSORS = {
    False: 3,
    True: 8,
}  # `b l e` read or written at least: u, delta, y; then u, delta, ȳ, ū, delta's


def default_specs() -> list[ScanSpec]:
    """Return all lengths at about equal work, and the shapes kernels are measured by.

    Less work where there is no GPU.
    """
    if jax.default_backend() != "gpu":
        return [of_length(length, 1024, 64) for length in LENGTHS if length <= 4096]
    sweep = [of_length(length, 28672, 384) for length in LENGTHS]
    targets = [dataclasses.replace(spec, D=False) for spec in TARGETS]
    return targets + [spec for spec in sweep if spec not in targets]


def cases(
    specs: Sequence[ScanSpec],
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    implementations: Sequence[str] = IMPLEMENTATIONS,
    gradients: Sequence[bool] = (False, True),
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements for `timing.run`; in bfloat16 those of kernels alone.

    What cannot run here is skipped once.
    """
    missing = {
        "pallas": gpu.kernels_missing,
        "triton": gpu.triton_missing,
        "mamba_ssm": mamba_ssm.missing,
    }
    reasons = {name: missing[name]() if name in missing else None for name in implementations}
    found: list[tuple[timing.Row, timing.Case]] = [
        ({"implementation": name}, timing.skipped(reason))
        for name, reason in reasons.items()
        if reason
    ]
    implementations = [name for name, reason in reasons.items() if not reason]
    for spec in specs:
        for dtype in dtypes:
            for gradient in gradients:
                for implementation in implementations:
                    if dtype == "bfloat16" and implementation.startswith("xla"):
                        continue
                    name = {
                        "shape": [spec.batch, spec.length, spec.channels],
                        "states": spec.states,
                        "dtype": dtype,
                        "gradient": gradient,
                        "implementation": implementation,
                    }
                    found.append((name, _case(spec, dtype, gradient, implementation)))
    return found


def function(implementation: str, options: dict[str, Any], gradient: bool) -> Callable[..., Any]:
    """Return a function of the arrays and the gradient of y: y, and on request the gradients of all arrays."""

    def forward(arrays):
        return selective_scan(**arrays, **options, implementation=implementation)

    def run(arrays, out_bar):
        if not gradient:
            return forward(arrays), {}
        y, pull = jax.vjp(forward, arrays)
        return y, pull(out_bar)[0]

    return run


def _arguments(spec: ScanSpec, dtype: str, seed: int) -> tuple[dict[str, jax.Array], jax.Array]:
    arrays, _ = spec.arguments(seed, dtype)
    out_bar = jax.random.normal(jax.random.key(seed), arrays["u"].shape).astype(dtype)
    return arrays, out_bar


@functools.lru_cache(maxsize=1)
def _expected(spec: ScanSpec, dtype: str, gradient: bool) -> Any:
    """Compute the reference's values, differentiated by JAX itself."""
    arguments = _arguments(spec, dtype, 0)
    program = timing.Program(
        function("reference", _options(spec), gradient), *arguments, hasty=True
    )
    return jax.block_until_ready(program(*arguments))


def _options(spec: ScanSpec) -> dict[str, Any]:
    return {"delta_softplus": spec.delta_softplus, "reverse": spec.reverse}


def checked(
    spec: ScanSpec, dtype: str, gradient: bool, implementation: str
) -> tuple[timing.Measured, float]:
    """Compile the measurement of one scan, and find its error against the reference."""
    measured = timing.Measured(
        function(implementation, _options(spec), gradient),
        lambda seed: _arguments(spec, dtype, seed),
    )
    expected = _expected(spec, dtype, gradient)
    return measured, timing.relative_error(measured.result(), expected)


def _case(spec: ScanSpec, dtype: str, gradient: bool, implementation: str) -> timing.Case:
    if implementation == "mamba_ssm":
        measured: Any = mamba_ssm.Peer(spec, dtype, gradient)
        error = timing.relative_error(measured.result(), _expected(spec, dtype, gradient))
        costs: timing.Row = {}
    else:
        measured, error = checked(spec, dtype, gradient, implementation)
        costs = measured.program.costs()
    yield None
    time = measured.time()
    del measured
    yield {
        "error": error,
        "correct": error <= TOLERANCES[dtype],
        **rates(spec, dtype, gradient, time.median),
        "dependent_steps": dependent_steps(implementation, spec),
        **dataclasses.asdict(time),
        **costs,
    }


def rates(spec: ScanSpec, dtype: str, gradient: bool, milliseconds: float) -> timing.Row:
    """Return the work of one call, the rates achieved, and the least times that this device could need."""
    elements = spec.batch * spec.length * spec.channels
    moved = TENSORS[gradient] * elements * jnp.dtype(dtype).itemsize
    operations = OPERATIONS[gradient] * elements * spec.states
    exponentials = EXPONENTIALS[gradient] * elements * spec.states
    row: timing.Row = {
        "GB_per_s": moved / milliseconds / 1e6,
        "GFLOP_per_s": operations / milliseconds / 1e6,
    }
    most = timing.ceilings()
    if most is not None:
        row["floor_memory_ms"] = 1e3 * moved / most.bandwidth
        row["floor_exponentials_ms"] = 1e3 * exponentials / most.exponentials
        row["floor_operations_ms"] = 1e3 * operations / most.float32
    return row


def dependent_steps(implementation: str, spec: ScanSpec) -> int | None:
    """Count the combinations that the last output waits for, one after another, in a forward pass.

    A step loop has one per token. A run of t tokens in an associative scan has a tree up and a tree down,
    2 log2 t, and runs follow one another. The kernels walk along time; where they split it, they do so twice, and in
    between combine the splits. None: not known.
    """
    if implementation == "pallas":
        return _kernel_steps(spec)
    if implementation == "xla_associative":
        from pallas_kernels.selective_scan.xla_associative import RUN_STATES

        chunk = chunk_length(spec.length)
        states = spec.batch * spec.channels * spec.states * chunk
        run = min(spec.length, chunk * max(1, RUN_STATES // states))
        return math.ceil(spec.length / run) * max(1, 2 * math.ceil(math.log2(run)) - 1)
    return None if implementation == "mamba_ssm" else spec.length


def _kernel_steps(spec: ScanSpec) -> int | None:
    if jax.__version_info__ < gpu.OLDEST_JAX:
        return None
    cut = kernel_plan(spec, gradient=False)
    return spec.length if cut.splits == 1 else 2 * cut.per_split * cut.chunk + cut.splits


def kernel_plan(spec: ScanSpec, gradient: bool) -> Any:
    """Describe how the kernels cut this scan, for a gradient to follow or without."""
    from pallas_kernels.selective_scan import mosaic

    arrays, _ = jax.eval_shape(lambda: _arguments(spec, "float32", 0))
    grouped = {k: arrays[k] if spec.groups else _with_group(arrays[k]) for k in "BC"}
    inputs = ScanInputs(**{**dict.fromkeys(("D", "z", "delta_bias")), **arrays, **grouped})
    chunk = mosaic.chunk_length(inputs) if gradient else mosaic.forward_chunk(inputs)
    options = ScanOptions(spec.delta_softplus, spec.reverse, False, chunk, keep_boundaries=gradient)
    return mosaic.plan(inputs, options, chunk)


def _with_group(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    b, l, n = x.shape
    return jax.ShapeDtypeStruct((b, l, 1, n), x.dtype)


def steps(specs: Sequence[ScanSpec]) -> list[timing.Row]:
    """Count each scan's dependent steps: as a loop, as an ideal parallel scan, and as implemented here."""
    return [
        {
            "shape": [spec.batch, spec.length, spec.channels],
            "sequential": spec.length,
            "parallel": math.ceil(math.log2(spec.length)) if spec.length > 1 else 0,
            "xla_associative": dependent_steps("xla_associative", spec),
            "pallas": dependent_steps("pallas", spec),
        }
        for spec in specs
    ]


# Columns of the printed table: heading, width, and the text of a row.
COLUMNS: tuple[tuple[str, int, Callable[[timing.Row], str]], ...] = (
    ("batch x length x channels", 26, lambda r: "x".join(map(str, r["shape"]))),
    ("dtype", 9, lambda r: r["dtype"]),
    ("what", 8, lambda r: "fwd+bwd" if r["gradient"] else "fwd"),
    ("implementation", 16, lambda r: r["implementation"]),
    ("ms", 9, lambda r: f"{r['median']:.4f}"),
    ("spread", 16, lambda r: f"{r['fastest']:.4f}-{r['slowest']:.4f}"),
    ("warm", 8, lambda r: "-" if r["warm"] is None else f"{r['warm']:.4f}"),
    ("GB/s", 7, lambda r: f"{r['GB_per_s']:.0f}"),
    ("GFLOP/s", 8, lambda r: f"{r['GFLOP_per_s']:.0f}"),
    ("peak MB", 8, lambda r: f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else "-"),
    ("compile s", 10, lambda r: f"{r['compile_seconds']:.1f}" if "compile_seconds" in r else "-"),
    ("steps", 6, lambda r: str(r["dependent_steps"] or "-")),
    ("error", 8, lambda r: f"{r['error']:.0e}"),
)  # fmt: skip

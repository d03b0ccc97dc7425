"""Times every implementation of the scan on the device at hand.

    python -m pallas_kernels.selective_scan.bench [--shapes targets] [--json FILE] ...

One compiled program runs the scan many times, each run waiting for the one before; programs take turns, so
that a busy machine is unfair to all alike. Forward and gradients are compared with the reference in the
same process, on the same arrays. Temporary memory is what XLA allocates for one call beside its
arguments and results.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.selective_scan import arg_specs
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from pallas_kernels.selective_scan.chunks import chunk_length

SHAPES = {
    "targets": arg_specs.TARGETS,
    "fastvim": arg_specs.FASTVIM,
    "vim": arg_specs.VIM,
    "small": arg_specs.SMALL,
    # For a laptop's CPU: the lengths 7 to 1024, with less batch the longer they are.
    "cpu": tuple(
        ScanSpec(batch, length, channels)
        for batch, length, channels in (
            (64, 7, 384), (64, 8, 128), (64, 14, 384), (16, 32, 384), (8, 64, 384), (4, 128, 384),
            (4, 196, 384), (1, 1024, 384),
        )
    ),
}  # fmt: skip
IMPLEMENTATIONS = ("xla_associative", "xla_sequential")

Function = Callable[[dict[str, jax.Array]], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation at one shape; times in milliseconds a call, memory in bytes."""

    spec: str
    implementation: str
    dtype: str
    gradient: bool  # forward and backward, else forward alone
    median: float
    fastest: float
    slowest: float
    temporary_bytes: int
    error: float  # worst array, relative to its largest entry
    compile_seconds: float
    dependent_steps: int


def dependent_steps(implementation: str, spec: ScanSpec) -> int:
    """How many combinations the last output waits for, one after another, in a forward pass.

    A step loop has one per token. A run of t tokens in an associative scan has a tree up and a tree down,
    2 log2 t, and runs follow one another.
    """
    if implementation != "xla_associative":
        return spec.length
    from pallas_kernels.selective_scan.xla_associative import RUN_STATES

    chunk = chunk_length(spec.length)
    states = spec.batch * spec.channels * spec.states * chunk
    run = min(spec.length, chunk * max(1, RUN_STATES // states))
    return math.ceil(spec.length / run) * max(1, 2 * math.ceil(math.log2(run)) - 1)


def function(implementation: str, options: dict[str, Any], gradient: bool) -> Function:
    """The scan of a dictionary of arrays, or all its gradients with a fixed smooth objective."""

    def forward(arrays):
        return selective_scan(**arrays, **options, implementation=implementation)

    def objective(arrays):
        y = forward(arrays).astype(jnp.float32)
        return jnp.mean(y + y**2)  # cheap, and its cotangent varies

    return jax.value_and_grad(objective) if gradient else forward


def repeated(f: Function) -> Callable[[dict[str, jax.Array], jax.Array], jax.Array]:
    """A program that calls f n times, each call waiting for the result of the last."""

    def program(arrays, n):
        def body(_, total):
            waiting, total = lax.optimization_barrier((arrays, total))
            results = lax.optimization_barrier(jax.tree.leaves(f(waiting)))
            return total + sum(x.ravel()[0].astype(jnp.float32) for x in results)

        return lax.fori_loop(0, n, body, jnp.float32(0))

    return program


def worst_error(actual: Any, expected: Any) -> float:
    """Largest difference over largest entry, the worst of all arrays; not a number where an entry is not finite."""

    def error(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)

    return float(jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(error, actual, expected)))))


def measure(
    spec: ScanSpec,
    implementations: Sequence[str],
    *,
    dtype: str = "float32",
    gradient: bool,
    repeats: int = 5,
    seconds: float = 0.2,
    seed: int = 0,
) -> list[Row]:
    """Time the implementations in turn, `repeats` programs of about `seconds` each.

    The expected values come from the reference, or from "xla_sequential" for gradients so long that
    keeping every state of the reference would take more than 4 GB.
    """
    arrays, options = spec.arguments(seed, dtype)
    kept = 4 * spec.batch * spec.length * spec.channels * spec.states
    reference = "xla_sequential" if gradient and kept > 2**30 else "reference"
    expected = jax.jit(function(reference, options, gradient))(arrays)
    programs = {}
    rows = {}
    for name in implementations:
        f = function(name, options, gradient)
        start = time.perf_counter()
        once = jax.jit(f).lower(arrays).compile()
        compiled_in = time.perf_counter() - start
        error = worst_error(once(arrays), expected)
        program = jax.jit(repeated(f)).lower(arrays, jnp.int32(1)).compile()
        count = 1
        while (elapsed := _seconds(program, arrays, count)) < seconds / 4 and count < 10**6:
            count *= 4
        count = max(1, round(count * seconds / elapsed))
        programs[name] = (program, count)
        memory = once.memory_analysis()
        rows[name] = Row(
            spec=spec.name,
            implementation=name,
            dtype=dtype,
            gradient=gradient,
            median=math.nan,
            fastest=math.nan,
            slowest=math.nan,
            temporary_bytes=0 if memory is None else memory.temp_size_in_bytes,
            error=error,
            compile_seconds=compiled_in,
            dependent_steps=dependent_steps(name, spec),
        )
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(repeats):
        for name, (program, count) in programs.items():
            times[name].append(1e3 * _seconds(program, arrays, count) / count)
    return [
        dataclasses.replace(rows[name], median=statistics.median(t), fastest=min(t), slowest=max(t))
        for name, t in times.items()
    ]


def _seconds(program: Any, arrays: dict[str, jax.Array], count: int) -> float:
    n = jnp.int32(count)
    start = time.perf_counter()
    jax.block_until_ready(program(arrays, n))
    return time.perf_counter() - start


def table(rows: Sequence[Row]) -> str:
    """The rows as text; the ratio is to the slowest of the same shape and direction."""
    head = "shape what implementation median_ms fastest slowest ratio temp_MB error steps compile_s"
    lines = [head.split()]
    for row in rows:
        same = [
            r for r in rows if (r.spec, r.gradient, r.dtype) == (row.spec, row.gradient, row.dtype)
        ]
        ratio = max(r.median for r in same) / row.median
        lines.append([
            row.spec, "fwd+bwd" if row.gradient else "fwd", row.implementation,
            f"{row.median:.3f}", f"{row.fastest:.3f}", f"{row.slowest:.3f}", f"{ratio:.2f}x",
            f"{row.temporary_bytes / 1e6:.1f}", f"{row.error:.0e}", str(row.dependent_steps),
            f"{row.compile_seconds:.1f}",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows with what they were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the implementations of selective_scan.")
    default = "cpu" if jax.default_backend() == "cpu" else "targets"
    parser.add_argument("--shapes", choices=sorted(SHAPES), default=default)
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of one timed program")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    for spec in SHAPES[options.shapes]:
        for gradient in (False, True):
            rows += measure(
                spec,
                options.implementations,
                dtype=options.dtype,
                gradient=gradient,
                repeats=options.repeats,
                seconds=options.seconds,
            )
            print(f"{spec.name} {'fwd+bwd' if gradient else 'fwd'} done", flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(report(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()

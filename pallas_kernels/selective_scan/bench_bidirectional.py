"""Measure what a mixer gains if both directions' scans are one operation, that is one kernel each way and not two."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import timing
from pallas_kernels.selective_scan import bench
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from pallas_kernels.selective_scan.bidirectional import bidirectional_scan

SPECS = (ScanSpec(128, 14, 384, D=False), ScanSpec(1, 14, 384, D=False))
"""Scans of FastVim-T at 224 pixels, of a batch and of one image."""


def at_once(arrays: dict[str, Any], implementation: str = "auto", **options: Any) -> Any:
    """Compute both directions' outputs by one operation."""
    return bidirectional_scan(**arrays, **options, implementation=implementation)


def one_by_one(arrays: dict[str, Any], implementation: str = "auto", **options: Any) -> Any:
    """Compute both directions' outputs by two scans."""
    options |= {"implementation": implementation}
    sides: list[dict[str, Any]] = [{k: x[d] for k, x in arrays.items()} for d in (0, 1)]
    return selective_scan(**sides[0], **options), selective_scan(
        **sides[1], **options, reverse=True
    )


WAYS: dict[str, Callable[..., Any]] = {"one by one": one_by_one, "at once": at_once}


def cases(
    specs: Sequence[ScanSpec] = SPECS,
    *,
    dtypes: Sequence[str] = ("float32",),
    gradients: Sequence[bool] = (False, True),
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements for `timing.run`. Specs describe one direction; the implementation is "auto"."""
    found: list[tuple[timing.Row, timing.Case]] = []
    for spec in specs:
        for dtype in dtypes:
            for gradient in gradients:
                for way in WAYS:
                    name = {
                        "shape": [spec.batch, spec.length, spec.channels],
                        "states": spec.states,
                        "dtype": dtype,
                        "gradient": gradient,
                        "scans": way,
                    }
                    found.append((name, _case(spec, dtype, gradient, way)))
    return found


def _arguments(spec: ScanSpec, dtype: str, seed: int) -> tuple[Any, Any]:
    sides = [spec.arguments(2 * seed + d, dtype)[0] for d in (0, 1)]
    arrays = jax.tree.map(lambda *pair: jnp.stack(pair), *sides)
    return arrays, jax.random.normal(jax.random.key(seed), arrays["u"].shape[1:]).astype(dtype)


def _function(way: str, spec: ScanSpec, gradient: bool, **options: Any) -> Callable[..., Any]:
    """Return a function of arrays and an output gradient: both outputs, and if asked for the gradients of all arrays.

    Both directions have the same output gradient, as in a mixer, which averages their outputs.
    """

    def run(arrays, out_bar):
        scans = lambda arrays: WAYS[way](arrays, delta_softplus=spec.delta_softplus, **options)  # noqa: E731
        if not gradient:
            return scans(arrays), {}
        y, pull = jax.vjp(scans, arrays)
        return y, pull((out_bar, out_bar))[0]

    return run


@functools.lru_cache(maxsize=1)
def _expected(spec: ScanSpec, dtype: str, gradient: bool) -> Any:
    """Compute the reference's values, differentiated by JAX itself."""
    arguments = _arguments(spec, dtype, 0)
    reference = _function("one by one", spec, gradient, implementation="reference")
    return jax.block_until_ready(timing.Program(reference, *arguments, hasty=True)(*arguments))


def _case(spec: ScanSpec, dtype: str, gradient: bool, way: str) -> timing.Case:
    measured = timing.Measured(
        _function(way, spec, gradient), lambda seed: _arguments(spec, dtype, seed)
    )
    error = timing.relative_error(measured.result(), _expected(spec, dtype, gradient))
    yield None
    time = measured.time()
    yield {
        "error": error,
        "correct": error <= bench.TOLERANCES[dtype],
        **dataclasses.asdict(time),
        **measured.program.costs(),
    }


COLUMNS: tuple[tuple[str, int, Callable[[timing.Row], str]], ...] = (
    ("batch x length x channels", 26, lambda r: "x".join(map(str, r["shape"]))),
    ("dtype", 9, lambda r: r["dtype"]),
    ("what", 8, lambda r: "fwd+bwd" if r["gradient"] else "fwd"),
    ("both directions", 16, lambda r: r["scans"]),
    ("ms", 9, lambda r: f"{r['median']:.4f}"),
    ("with gaps", 10, lambda r: "-" if r["span"] is None else f"{r['span']:.4f}"),
    ("warm", 8, lambda r: "-" if r["warm"] is None else f"{r['warm']:.4f}"),
    ("error", 8, lambda r: f"{r['error']:.0e}"),
)  # fmt: skip

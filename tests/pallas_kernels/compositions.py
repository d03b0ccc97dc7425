"""Every operation with its gradients under JAX's transformations, against float64: cases for the CPU and for a GPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import selective_scan
from pallas_kernels.mixer_core import mixer_core, sequence_core
from pallas_kernels.selective_scan import bidirectional_scan
from tests.pallas_kernels import test_bidirectional_scan as both
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels import test_mosaic_ragged as ragged
from tests.pallas_kernels import test_mosaic_scan as scan
from tests.pallas_kernels import test_mosaic_sequence as sequence
from tests.support import x64

EXAMPLES = 4  # two by two under nested vmap


@dataclasses.dataclass(frozen=True)
class Operation:
    """draw: maps a generator to (arguments, row ids); run: maps these and an implementation to the output."""

    draw: Callable[[np.random.Generator], tuple[Any, Any]]
    run: Callable[[Any, Any, str], Any]


def _scan(floats, ids, implementation):
    return selective_scan(**floats, return_last_state=True, implementation=implementation)


def _both(floats, ids, implementation):
    return bidirectional_scan(**floats, implementation=implementation)


def _core(options, floats, ids, implementation):
    more = {"row_ids": ids} if ids else {}
    return mixer_core(*floats, middle=core.middle, implementation=implementation, **options, **more)


def _sequence(floats, ids, implementation):
    return sequence_core(*floats, middle=sequence.middle, implementation=implementation)


def _core_operation(b: int, rows: int, columns: int, e: int, **options) -> Operation:
    options |= {"rows": rows, "columns": columns}
    draw = lambda rng: (core.draw_apart(rng, b=b, e=e, **options)[0], ())  # noqa: E731
    return Operation(draw, functools.partial(_core, options))


def _draw_ragged(rng, b, kept, rows, columns, e):
    (*floats, ids), _ = ragged.draw(rng, b, kept, rows, columns, e)
    return tuple(floats), ids


def operations(channels: int, batch: int = 3) -> dict[str, Operation]:
    """Return the operations at odd sizes; `channels` is a multiple of 128."""
    e = channels
    return {
        "scan": Operation(lambda rng: (scan.draw(rng, batch, 37, 40, 7), ()), _scan),
        "bidirectional": Operation(lambda rng: (both.draw(rng, batch, 9, 40, 5), ()), _both),
        "core": _core_operation(batch, 6, 7, e),
        "core, columns": _core_operation(batch, 5, 7, e, transposed=True),
        "core, max": _core_operation(batch, 3, 5, e, method="max"),
        "core, ragged": Operation(
            lambda rng: _draw_ragged(rng, batch, 14, 5, 6, e),
            functools.partial(_core, {"rows": 5, "columns": 6}),
        ),
        "sequence": Operation(lambda rng: (sequence.draw(rng, batch, 21, e)[0], ()), _sequence),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """Some examples of an operation. Leaves with an axis of None are the same in all of them."""

    operation: Operation
    structure: Any
    axes: tuple[int | None, ...]
    leaves: tuple[
        jax.Array, ...
    ]  # of all examples, stacked along their axis; those of the cotangent last

    def example(self, leaves) -> tuple[Any, Any, Any]:
        """Return (floats, ids, cotangent) from one example's leaves."""
        return jax.tree.unflatten(self.structure, leaves)

    def value_and_gradients(self, implementation: str, leaves, wrap=lambda f: f) -> Any:
        """Run one example and pull its cotangent back; `wrap` transforms the operation before."""
        floats, ids, cotangent = self.example(leaves)
        run = wrap(lambda floats, ids: self.operation.run(floats, ids, implementation))
        out, pull = jax.vjp(lambda floats: run(floats, ids), floats)
        return out, pull(cotangent)[0]

    def wanted(self) -> Any:
        """Compute the results one by one in float64 on the CPU by XLA."""
        with jax.default_device(jax.devices("cpu")[0]), x64():
            run = jax.jit(lambda leaves: self.value_and_gradients("xla", leaves))
            results = []
            for i in range(EXAMPLES):
                leaves = [
                    np.asarray(x) if a is None else np.take(np.asarray(x), i, a)
                    for x, a in zip(self.leaves, self.axes, strict=True)
                ]
                results.append(jax.device_get(run(ragged.in_float64(leaves))))
            return jax.tree.map(lambda *x: np.stack(x), *results)


def draw(rng: np.random.Generator, operation: Operation) -> Case:
    """Draw examples whose arrays are stacked along any axis, or the same in all of them."""
    drawn = []
    for _ in range(EXAMPLES):
        floats, ids = operation.draw(rng)
        out = jax.eval_shape(lambda f=floats, i=ids: operation.run(f, i, "xla"))
        normal = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
        drawn.append((floats, ids, jax.tree.map(normal, out)))
    structure = jax.tree.structure(drawn[0])
    columns = list(zip(*map(jax.tree.leaves, drawn), strict=True))
    axes = [
        int(rng.integers(x[0].ndim + 1)) if i == 0 or rng.integers(3) else None
        for i, x in enumerate(columns)
    ]
    leaves = (x[0] if a is None else jnp.stack(x, a) for x, a in zip(columns, axes, strict=True))
    return Case(operation, structure, tuple(axes), tuple(leaves))


def _mapped_first(case: Case, leaves) -> list[jax.Array]:
    """Return the mapped leaves with the examples' axis first."""
    pairs = zip(leaves, case.axes, strict=True)
    return [jnp.moveaxis(x, a, 0) for x, a in pairs if a is not None]


def _merged(case: Case, leaves, mapped) -> list[jax.Array]:
    """Return one example's leaves from its mapped ones."""
    mapped = iter(mapped)
    return [x if a is None else next(mapped) for x, a in zip(leaves, case.axes, strict=True)]


def vmapped(case: Case, implementation: str, leaves):
    """Map over whatever axis each array has."""
    run = lambda *leaves: case.value_and_gradients(implementation, leaves)  # noqa: E731
    return jax.vmap(run, case.axes)(*leaves)


def vmapped_twice(case: Case, implementation: str, leaves):
    """Map over two axes; the inner one is the last of some arrays."""
    run = lambda *mapped: case.value_and_gradients(  # noqa: E731
        implementation, _merged(case, leaves, mapped)
    )
    mapped = [x.reshape(2, EXAMPLES // 2, *x.shape[1:]) for x in _mapped_first(case, leaves)]
    inner = [i % 2 for i in range(len(mapped))]
    mapped = [
        jnp.swapaxes(x, 1, 2) if a and x.ndim > 2 else x for x, a in zip(mapped, inner, strict=True)
    ]
    inner = [a if x.ndim > 2 else 0 for x, a in zip(mapped, inner, strict=True)]
    out = jax.vmap(jax.vmap(run, inner))(*mapped)
    return jax.tree.map(lambda x: x.reshape(EXAMPLES, *x.shape[2:]), out)


def in_a_map(case: Case, implementation: str, leaves):
    """Run one example after the other."""
    one = lambda mapped: case.value_and_gradients(  # noqa: E731
        implementation, _merged(case, leaves, mapped)
    )
    return jax.lax.map(one, _mapped_first(case, leaves))


def rematerialised_in_a_scan(case: Case, implementation: str, leaves):
    """Run examples one after the other, and the forward pass again for the gradients."""

    def step(carry, mapped):
        leaves_of_it = _merged(case, leaves, mapped)
        return carry, case.value_and_gradients(implementation, leaves_of_it, jax.checkpoint)

    return jax.lax.scan(step, (), _mapped_first(case, leaves))[1]


def vmapped_in_a_shard_map(case: Case, implementation: str, leaves):
    """Let every device map over examples of its own."""
    count = max(n for n in (1, 2, 4) if n <= jax.device_count())
    mesh = jax.make_mesh(
        (count,), ("examples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )

    def run(leaves, mapped):
        # Every example has gradients of its own: of what all devices share JAX would add them up.
        leaves = jax.tree.map(lambda x: jax.lax.pcast(x, "examples", to="varying"), leaves)
        one = lambda *mapped: case.value_and_gradients(  # noqa: E731
            implementation, _merged(case, leaves, mapped)
        )
        return jax.vmap(one)(*mapped)

    same = [None if a is not None else x for x, a in zip(leaves, case.axes, strict=True)]
    return jax.shard_map(run, mesh=mesh, in_specs=(P(), P("examples")), out_specs=P("examples"))(
        same, _mapped_first(case, leaves)
    )


COMPOSITIONS = {
    f.__name__: f
    for f in (
        vmapped,
        vmapped_twice,
        in_a_map,
        rematerialised_in_a_scan,
        vmapped_in_a_shard_map,
    )
}

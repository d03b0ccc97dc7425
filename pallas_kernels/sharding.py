"""Run an operation on each device's share of its arrays under a sharded `jit`.

An operation names the dimensions of its arrays by letters, as in `"b l e"`, and says which letters may be split over
devices. Everything else follows from the shardings of the arrays. An array is divided along the letters that are split,
and is whole along the others (sharded weights are gathered). If a result lacks a letter that is split, it is summed
over the devices' shares, in its own dtype. The mesh decides how the shardings are known:

- Explicit axes (the default of `jax.make_mesh`): the types of the arrays hold them. `jax.shard_map` splits.
- Auto axes: only operations that hold kernels (`opaque`) are split here. XLA's partitioner splits all others by itself.
    - If the caller said over which axes of the ambient mesh batches are split (`batch_over`), `jax.shard_map` splits.
    - Otherwise, or without a mesh, XLA's partitioner finds the shardings when it compiles, and `custom_partitioning`
      splits. JAX cannot differentiate this: put a custom_vjp around the operation, and make its gradient a second
      operation. Such a program contains a number of the process that made it, so that JAX's persistent compilation
      cache never finds it again.
- Manual axes (inside a `jax.shard_map` of the caller, with check_vma or without): the arrays are shares already.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import sharding_impls
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import gpu

Dims = tuple[str, ...]  # letters of one array's dimensions


@dataclasses.dataclass(frozen=True)
class Shard:
    """Say how whole arrays are split: the mesh axes that divide each letter, and the sizes of all mesh axes."""

    axes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def parts(self, letter: str) -> int:
        """Return the number of shares into which a letter is divided."""
        return math.prod(self.sizes[axis] for axis in self.axes.get(letter, ()))

    def index(self, letter: str) -> jax.Array | int:
        """Return the number of this device's share. Call it only inside of the operation."""
        axes = self.axes.get(letter, ())
        return lax.axis_index(axes) if axes else 0

    def spec(self, dims: Dims) -> P:
        """Return the PartitionSpec of an array."""
        return P(*(self.axes.get(letter) or None for letter in dims))


@dataclasses.dataclass(frozen=True)
class _Operation:
    """Hold a function from a Shard and flat arrays to a tuple of arrays, with the letters of their dimensions.

    Only arrays that have every letter of `voters` decide which mesh axes split a letter. So weights do not decide.
    `split` and `tied` are as for `per_shard`.
    """

    function: Callable[..., tuple[jax.Array, ...]]
    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    split: Dims
    voters: Dims
    tied: Mapping[str, str]

    def shard(self, specs: Sequence[P | None], shapes: Sequence[tuple[int, ...]], sizes) -> Shard:
        """Find which mesh axes split each letter, given each operand's PartitionSpec."""
        shard = Shard({}, dict(sizes))
        voting = [
            (dims, spec, shape)
            for dims, spec, shape in zip(self.operands, specs, shapes, strict=True)
            if spec is not None and set(self.voters) <= set(dims)
        ]
        axes: dict[str, tuple[str, ...]] = {}
        for letter in self.split:
            taken = {axis for of_letter in axes.values() for axis in of_letter}
            for dims, spec, shape in voting:
                if letter not in dims or letter in axes:
                    continue
                at = dims.index(letter)
                entry = spec[at] if at < len(spec) else None
                entry = entry if isinstance(entry, tuple) else (entry,)
                wanted = [a for a in entry if isinstance(a, str) and a not in taken]
                while wanted and shape[at] % math.prod(sizes[a] for a in wanted):
                    wanted.pop()
                if wanted:
                    axes[letter] = tuple(wanted)
        shard = dataclasses.replace(shard, axes=axes)
        for letter, other in self.tied.items():
            extents = [
                s[d.index(letter)]
                for d, s in zip(self.operands, shapes, strict=True)
                if letter in d
            ]
            if extents and shard.parts(other) > 1 and extents[0] % shard.parts(other) == 0:
                axes[letter] = axes[other]
        return shard

    def run(self, shard: Shard, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Run the function on one device's shares, and sum results that lack a split letter over the devices."""
        tied = {t for t in self.tied if t in shard.axes}

        def summed(x, dims):
            there = {*dims, *(self.tied[t] for t in dims if t in tied)}
            axes = [
                a
                for letter in self.split
                if letter not in there
                for a in shard.axes.get(letter, ())
            ]
            return lax.psum(x, tuple(axes)) if axes else x

        out = self.function(shard, *arrays)
        return tuple(summed(x, dims) for x, dims in zip(out, self.results, strict=True))

    def under_shard_map(
        self, mesh, given: Sequence[P], arrays: Sequence[jax.Array]
    ) -> tuple[jax.Array, ...]:
        """Run on a known mesh, with arrays that are split as the PartitionSpecs `given` say."""
        shard = self.shard(given, [x.shape for x in arrays], mesh.shape)
        specs = tuple(shard.spec(dims) for dims in self.operands)
        return jax.shard_map(
            lambda *shares: self.run(shard, *shares),
            mesh=mesh,
            in_specs=specs,
            out_specs=tuple(shard.spec(dims) for dims in self.results),
            axis_names={
                a
                for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True)
                if t != AxisType.Manual
            },
            check_vma=False,
        )(*(_reshard(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)))

    def under_the_partitioner(self, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Run with the shardings that XLA's partitioner finds. A program for one device is not changed."""

        ambient = jax.sharding.get_abstract_mesh()

        def partition(mesh, arguments, results):
            del results
            if mesh.empty:
                mesh, specs = _decoded(arguments, ambient)
            else:
                specs = [x.sharding.spec for x in arguments]
            shard = self.shard(specs, [x.shape for x in arguments], mesh.shape)
            place = lambda dims: NamedSharding(mesh, shard.spec(dims))  # noqa: E731
            return (
                mesh,
                lambda *shares: self.run(shard, *shares),
                tuple(map(place, self.results)),
                tuple(map(place, self.operands)),
            )

        letters = dict.fromkeys(
            letter for dims in (*self.operands, *self.results) for letter in dims
        )
        rule, partitioned = " -> ", custom_partitioning(lambda *arrays: self.run(Shard(), *arrays))
        partitioned.def_partition(
            partition,
            sharding_rule=rule.join(
                ", ".join(map(" ".join, side)) for side in (self.operands, self.results)
            ),
            need_replication_factors=tuple(  # in the order in which the rule first names them
                letter for letter in letters if letter not in (*self.split, *self.tied)
            ),
        )
        # custom_partitioning has no rule for vmap.
        run = jax.custom_batching.custom_vmap(partitioned)

        @run.def_vmap
        def batch(axis_size, batched, *arrays):
            del axis_size
            out = self.vmapped(batched).under_the_partitioner(arrays)
            return out, tuple(True for _ in out)

        return run(*arrays)

    def vmapped(self, batched: Sequence[bool]) -> _Operation:
        """Return the operation with one more leading dimension (of `jax.vmap`), which may be split as well."""
        new = f"v{len(self.split)}"
        dims = lambda old, has: (new, *old) if has else old  # noqa: E731
        in_axes = tuple(0 if has else None for has in batched)
        return dataclasses.replace(
            self,
            function=lambda shard, *arrays: jax.vmap(
                lambda *arrays: self.function(shard, *arrays), in_axes
            )(*arrays),
            operands=tuple(map(dims, self.operands, batched)),
            results=tuple(dims(old, True) for old in self.results),
            split=(*self.split, new),
        )


def per_shard(
    function: Callable[..., Any],
    operands: Any,
    results: Any,
    *,
    split: str,
    tied: Mapping[str, str] | None = None,
    opaque: bool,
) -> Callable[..., Any]:
    """Run `function` on every device's share of the arrays.

    Args:
        function: takes a `Shard`, then pytrees of arrays, and returns a pytree of arrays. It must work on any share
            along the letters in `split`. A result without such a letter must be the sum over the share.
        operands: a pytree for each argument, with its arrays' letters, such as `"b l e"`, in place of the arrays.
        results: the same for the result.
        split: letters that may be divided over devices, separated by spaces. Mesh axes that divide a letter are not
            used for later letters. Mesh axes that do not divide a dimension evenly are not used.
        tied: letters that are split like another letter (a letter of `split`) if its axes divide them evenly.
        opaque: whether the function holds calls that XLA's partitioner cannot split by itself.

    Returns:
        The function of whole arrays.
    """
    letters = lambda tree: tuple(tuple(dims.split()) for dims in jax.tree.leaves(tree))  # noqa: E731

    def call(*arguments):
        arrays, structure = jax.tree.flatten(arguments)

        def flat(shard, *arrays):
            return tuple(jax.tree.leaves(function(shard, *jax.tree.unflatten(structure, arrays))))

        operation = _Operation(
            flat,
            letters(operands),
            letters(results),
            tuple(split.split()),
            tuple(split.split()),
            tied or {},
        )
        mesh = _typed_mesh(arrays)
        by_types = mesh is not None and any(t != AxisType.Manual for t in mesh.axis_types)
        # The interpreter's ordered effects pass neither the partitioner nor a shard_map.
        must_split = mesh is None and opaque and not gpu.interpreted()
        ambient, axes = jax.sharding.get_abstract_mesh(), _batch_axes.get()
        known = bool(axes) and set(axes) <= set(ambient.axis_names)
        if by_types:
            given = [jax.typeof(x).sharding.spec for x in arrays]
            out = operation.under_shard_map(mesh, given, arrays)
        elif must_split and known and ambient.size > 1:
            given = [_of_batch(dims, axes) for dims in operation.operands]
            out = operation.under_shard_map(ambient, given, arrays)
        elif must_split and not known:
            out = operation.under_the_partitioner(arrays)
        else:
            return mark_varying(function(Shard(), *mark_varying(arguments, arguments)), arguments)
        return jax.tree.unflatten(jax.tree.structure(results), out)

    return call


_batch_axes: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("axes", default=())


@contextlib.contextmanager
def batch_over(*axes: str) -> Iterator[None]:
    """Split the batch of every operation traced inside over these Auto axes of the ambient mesh (`jax.set_mesh`).

    Results do not depend on it. Without it, every process compiles programs with kernels again, because JAX's
    persistent compilation cache cannot find programs that XLA's partitioner splits.
    """
    before = _batch_axes.set(axes)
    try:
        yield
    finally:
        _batch_axes.reset(before)


def _of_batch(dims: Dims, axes: tuple[str, ...]) -> P:
    return P(*(axes if letter == "b" else None for letter in dims))


def _typed_mesh(arrays: Sequence[jax.Array]):
    """Return the mesh of the arrays' types, if it has Explicit or Manual axes."""
    for x in arrays:
        mesh = jax.typeof(x).sharding.mesh
        if any(t != AxisType.Auto for t in mesh.axis_types):
            return mesh
    return None


def _decoded(arguments: Sequence[jax.ShapeDtypeStruct], ambient) -> tuple[Mesh, list[P]]:
    """Return mesh and PartitionSpecs if the partitioner knows neither, because no argument of the jit was sharded."""
    devices = np.asarray(arguments[0].sharding._device_assignment)
    if ambient.empty:
        return Mesh(devices, ("devices",)), [P()] * len(arguments)
    mesh = Mesh(devices.reshape(ambient.axis_sizes), ambient.axis_names)
    parse = sharding_impls.parse_flatten_op_sharding
    return mesh, [parse(x.sharding._to_xla_hlo_sharding(x.ndim), mesh)[0] for x in arguments]


def _reshard(x: jax.Array, sharding) -> jax.Array:
    if AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(x).sharding == sharding:
        return x
    return jax.sharding.reshard(x, sharding)


def match_types(gradients: Any, arrays: Any) -> Any:
    """Give gradients the dtypes of their arrays and, on Explicit axes, the shardings.

    Sum each gradient over the Manual axes over which it varies and its array does not.
    """

    def one(gradient, x):
        axes = _in_order(varying_axes(gradient) - varying_axes(x))
        gradient = lax.psum(gradient, axes) if axes else gradient
        return _reshard(gradient.astype(x.dtype), jax.typeof(x).sharding)

    return jax.tree.map(one, gradients, arrays)


def mark_varying(results: Any, arrays: Any) -> Any:
    """Mark results as varying over all Manual axes over which any of `arrays` varies.

    Otherwise `shard_map` rejects them: the types of a kernel's results say nothing about Manual axes.
    """
    axes = frozenset[str]().union(*(varying_axes(x) for x in jax.tree.leaves(arrays)))
    cast = lambda x: lax.pcast(x, _in_order(axes - varying_axes(x)), to="varying")  # noqa: E731
    return jax.tree.map(cast, results) if axes else results


def cast_parameter(parameter: jax.Array, dtype: Any, tokens: jax.Array) -> jax.Array:
    """Cast a parameter to the dtype in which it meets `tokens`.

    Inside a `jax.shard_map` of the caller that splits the tokens, first mark the parameter as varying over the same
    mesh axes. Otherwise JAX marks it after the cast, and sums its gradient over the devices in `dtype`, which is done
    inside of `sums_as_computed`.
    """
    marked = parameter if _as_computed.get() else mark_varying(parameter, tokens)
    return marked.astype(dtype)


_as_computed: contextvars.ContextVar[bool] = contextvars.ContextVar("as_computed", default=False)


@contextlib.contextmanager
def sums_as_computed() -> Iterator[None]:
    """Sum gradients of `cast_parameter` over a `jax.shard_map`'s devices in the dtype to which the parameter was cast.

    It has effect where the function that is differentiated is traced. Without it, they are summed in the parameter's
    own dtype.
    """
    before = _as_computed.set(True)
    try:
        yield
    finally:
        _as_computed.reset(before)


def on_cuda(kernel: Callable, other: Callable, *arrays: Any) -> Any:
    """Apply `kernel` to arrays if the program is lowered for CUDA, otherwise `other`, which computes the same."""
    return lax.platform_dependent(
        *arrays,
        cuda=lambda *arrays: mark_varying(kernel(*arrays), arrays),
        default=lambda *arrays: other(*arrays),
    )


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Return the Manual axes over which a value may differ, as far as JAX tracks it (shard_map's check_vma)."""
    return frozenset(jax.typeof(x).mat.varying)


def _in_order(axes: frozenset[str]) -> tuple[str, ...]:
    """Return axes in the order of the mesh.

    Sums name their axes in this order. That of a set is another one in each process, and processes whose programs
    differ wait for each other forever.
    """
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(sorted(axes, key=lambda axis: (names.index(axis) if axis in names else -1, axis)))

"""Place parameters, optimizer states and batches on the mesh, and gather parameters during a step.

Between steps, a parameter is split over the axis `fsdp` along its largest dimension that divides evenly, never along
the dimension of blocks. Small parameters are replicated. Moments and averages are placed like their parameter.

During a step, `gather` replicates the parameters of one block just before the block runs. Its backward pass splits the
gradient again. Without `gather` the compiler may split the matrix products instead, which moves more data. The
backward pass keeps the replicated parameters of every block, unless the model recomputes its blocks (`remat`).
Steps that compute gradients device by device (`training.reduction.gradient_by_device`) gather all of them before.

`gather`, `on_every_device` and `split_batch` read the ambient mesh (`jax.set_mesh`). Without a mesh they do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath

from fastvim_jax.distributed.mesh import DATA, FSDP

BATCH = P((DATA, FSDP))
Method = TypeVar("Method", bound=Callable[..., Any])
SMALLEST = 2**14
"""Parameters with fewer entries are replicated, as splitting them saves little memory and costs a message each. Each
of 4 devices keeps 0.28 of FastVim-S' state and 0.26 of FastVim-B's. With 2**16 it would be 0.36 of FastVim-S', whose
blocks have many small parameters; with 2**12 a step would gather several times as many arrays."""


def parameter_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Return how to split a parameter of this shape, without a dimension of blocks, over `fsdp` devices."""
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or np.prod(shape) < SMALLEST:
        return P()
    largest = max(axes, key=lambda axis: shape[axis])
    return P(*(FSDP if axis == largest else None for axis in range(largest + 1)))


def state_shardings(mesh: Mesh, tree: Any, *, stacked_key: Callable[[KeyPath], int | None]) -> Any:
    """Build the tree of shardings for parameters, or for a tree that holds parameters, such as an optimizer's state.

    Args:
        mesh: the mesh, with an axis `fsdp`.
        tree: arrays, or their shapes and dtypes.
        stacked_key: returns the place in the path of a leaf that names the stacked blocks, or None if the leaf has no
            leading axis of blocks.
    """
    fsdp = mesh.shape[FSDP]

    def place(path: KeyPath, leaf: Any) -> NamedSharding:
        stacked = stacked_key(path) is not None and leaf.ndim > 0
        spec = parameter_spec(leaf.shape[1:] if stacked else leaf.shape, fsdp)
        return NamedSharding(mesh, P(None, *spec) if stacked and spec else spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a whole array on every device."""
    return NamedSharding(mesh, P())


def place_whole(tree: Any, place: NamedSharding) -> Any:
    """Place arrays that every process holds whole, such as weights from a file.

    They pass through the host's memory, because a device's copy cannot go to the devices of another process.
    """
    return jax.device_put(jax.device_get(tree), place)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits an array over all devices along its first axis, the batch."""
    return NamedSharding(mesh, BATCH)


def place_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Build a global batch, split over all devices, from the part of the batch that each process holds.

    Process i holds the i-th contiguous part. Arrays that are split over several processes already are kept.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return dict(jax.device_put(dict(batch), sharding))
    return {
        key: value
        if isinstance(value, jax.Array) and not value.is_fully_addressable
        else jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for key, value in batch.items()
    }


def with_auto_axes(method: Method) -> Method:
    """Decorate a model's method whose first argument is images, so that it accepts images on Explicit mesh axes.

    `jax.make_mesh` makes Explicit axes by default. Inside the method the axes are Auto: the compiler decides how to
    split the work. Results are split along the batch like the images, and gradients like their parameters. Outside of
    `jit`, the parameters must be on the mesh too, and gradients need the mesh to be set by `jax.set_mesh`.
    """

    @functools.wraps(method)
    def call(self, images, **options):
        if not hasattr(images, "shape"):  # Not an array: the method raises the error.
            return method(self, images, **options)
        given = jax.typeof(images).sharding
        kinds = zip(given.mesh.axis_names, given.mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        if not explicit:
            return method(self, images, **options)
        graphdef, state = nnx.split(self)

        def run(state, images, options):
            return method(nnx.merge(graphdef, state), images, **options)

        split = NamedSharding(given.mesh, P(given.spec[0]))
        inner = jax.sharding.auto_axes(run, axes=explicit, out_sharding=split)
        return inner(state, images, options)

    return call  # type: ignore[return-value]


def gather(tree: Any) -> Any:
    """Replicate parameters for their use inside a step. The backward pass splits their gradients again."""
    fsdp = _axes().get(FSDP, 1)
    return tree if fsdp == 1 else jax.tree.map(_gather_one, tree)


def on_every_device(tree: Any) -> Any:
    """Replicate results, so that every process can read them."""
    if FSDP not in _axes():
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)


def split_batch(tree: Any, axis: int = 0) -> Any:
    """Split arrays over all devices along `axis`, the batch."""
    if FSDP not in _axes():
        return tree
    spec = P(*[None] * axis, *BATCH)
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spec), tree)


def _axes() -> dict[str, int]:
    """Return the sizes of the ambient mesh's Auto axes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


@jax.custom_vjp
def _gather_one(parameter: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(_as_stored(parameter), P())


def _as_stored(parameter: jax.Array) -> jax.Array:
    # Applied before gathering too, so that a recomputed block saves its parameters split.
    spec = parameter_spec(parameter.shape, _axes()[FSDP])
    return jax.lax.with_sharding_constraint(parameter, spec)


def _gather_one_forward(parameter: jax.Array) -> tuple[jax.Array, None]:
    return _gather_one(parameter), None


def _gather_one_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (_as_stored(gradient),)


_gather_one.defvjp(_gather_one_forward, _gather_one_backward)

"""What lies where on the mesh, and where it has to be during a step.

Stored: a parameter is split over `fsdp` along its largest axis that divides evenly (never the axis of blocks), small
ones are on every device; moments and the average lie like their parameter. Used: `gather` makes a block's parameters
whole where the block runs, and its backward pass returns the gradient to where the parameter is stored. Without it,
the compiler may as well split the products themselves, which costs more traffic and reshapes the activations.
What the backward pass keeps of a block are its whole parameters, unless the model recomputes blocks (remat).

Inside a step these functions read the ambient mesh (`jax.set_mesh`); without one they do nothing.
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
SMALLEST = 2**16
"""Parameters of fewer entries are on every device: spreading them saves nothing and costs a message each."""


def parameter_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Choose how an unstacked parameter of this shape is split over `fsdp` devices."""
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or np.prod(shape) < SMALLEST:
        return P()
    largest = max(axes, key=lambda axis: shape[axis])
    return P(*(FSDP if axis == largest else None for axis in range(largest + 1)))


def state_shardings(mesh: Mesh, tree: Any, *, stacked_key: Callable[[KeyPath], int | None]) -> Any:
    """Build a `NamedSharding` for every leaf of parameters, or of anything that has parameters in it.

    Args:
        mesh: the mesh.
        tree: arrays or shapes.
        stacked_key: returns None for the path of a leaf that has no leading axis of blocks.
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


def place_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Assemble a global batch, split over the devices, from every process's own contiguous share of it.

    Arrays that are split over these devices already are kept.
    """
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return dict(jax.device_put(dict(batch), sharding))
    return {
        key: value
        if isinstance(value, jax.Array) and not value.is_fully_addressable
        else jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for key, value in batch.items()
    }


def with_auto_axes(method: Method) -> Method:
    """Decorate a model's method of images for meshes with Explicit axes (`jax.make_mesh` makes them by default).

    Inside, the axes are Auto: the compiler splits the work by where images and parameters lie. Results are split as
    the images' batch is; a parameter's gradient lies like the parameter. Outside of `jit`, JAX wants the parameters on
    the mesh as well, and for gradients the mesh set by `jax.set_mesh`.
    """

    @functools.wraps(method)
    def call(self, images, **options):
        if not hasattr(images, "shape"):  # no array: the method says what it wants
            return method(self, images, **options)
        lies = jax.typeof(images).sharding
        kinds = zip(lies.mesh.axis_names, lies.mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        if not explicit:
            return method(self, images, **options)
        graphdef, state = nnx.split(self)

        def run(state, images, options):
            return method(nnx.merge(graphdef, state), images, **options)

        split = NamedSharding(lies.mesh, P(lies.spec[0]))
        inner = jax.sharding.auto_axes(run, axes=explicit, out_sharding=split)
        return inner(state, images, options)

    return call  # type: ignore[return-value]


def gather(tree: Any) -> Any:
    """Parameters made whole for their use inside a step; gradients go back to where the parameters are stored."""
    fsdp = _axes().get(FSDP, 1)
    return tree if fsdp == 1 else jax.tree.map(_gather_one, tree)


def on_every_device(tree: Any) -> Any:
    """Results that every process has to read."""
    if FSDP not in _axes():
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)


def split_batch(tree: Any, axis: int = 0) -> Any:
    """Arrays split over all devices along `axis`, that of the batch."""
    if FSDP not in _axes():
        return tree
    spec = P(*[None] * axis, *BATCH)
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spec), tree)


def _axes() -> dict[str, int]:
    """Sizes of the ambient mesh's axes that the compiler splits over by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


@jax.custom_vjp
def _gather_one(parameter: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(_as_stored(parameter), P())


def _as_stored(parameter: jax.Array) -> jax.Array:
    # Also before gathering: else what a recomputed block keeps of its parameters would be whole.
    spec = parameter_spec(parameter.shape, _axes()[FSDP])
    return jax.lax.with_sharding_constraint(parameter, spec)


def _gather_one_forward(parameter: jax.Array) -> tuple[jax.Array, None]:
    return _gather_one(parameter), None


def _gather_one_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (_as_stored(gradient),)


_gather_one.defvjp(_gather_one_forward, _gather_one_backward)

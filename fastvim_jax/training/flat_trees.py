"""Flatten trees of arrays to dotted names, as checkpoints store them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.tree_util import DictKey, KeyPath


def flatten(tree: Any) -> dict[str, Any]:
    """Flatten a pytree to its arrays under dotted names, e.g. `blocks.mixer.in_proj.kernel`."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(template: Any, flat: Mapping[str, Any]) -> Any:
    """Invert `flatten`, in the structure of `template`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    return jax.tree_util.tree_unflatten(structure, [flat[_dotted(path)] for path, _ in paths])


def _dotted(path: KeyPath) -> str:
    # Drop the last key of an NNX variable: Flax adds it below the dictionary and chooses its name.
    if len(path) > 1 and isinstance(path[-2], DictKey) and not isinstance(path[-1], DictKey):
        path = path[:-1]
    parts = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)
    return ".".join(map(str, parts))


def abstract(flat: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype and sharding of every array of a flat tree."""
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in flat.items()
    }


def signature(params: Any) -> dict[str, str]:
    """Describe dtype and shape of every array of a tree, e.g. `float32[192,1000]`, by its dotted name."""
    return {
        name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for name, leaf in flatten(params).items()
    }

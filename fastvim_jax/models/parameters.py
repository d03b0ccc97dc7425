"""Access parameters by name. Whatever is defined per parameter is defined on the unstacked one, of a single block.

Blocks are stored stacked: the leaf `blocks.mixer.D` of shape `depth e` stands for the parameters
`blocks.0.mixer.D`, `blocks.1.mixer.D`, ... of shape `e`. So does every leaf below a key `blocks`, for example
`decoder.blocks.mixer.D`: the key `blocks` is reserved for stacks, and a model may hold several. These functions work on
the parameters and on every pytree of the same structure: gradients, Adam's moments, averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from fastvim_jax.errors import UserError

STACK = "blocks"


def stacked_key(path: KeyPath) -> int | None:
    """Return the place of the key `blocks` in a leaf's path, or None. With it, the leaf has a leading axis of blocks.

    This one rule decides what is stacked, in parameters and in every pytree that contains them, such as the optimizer's
    state.
    """
    for index, key in enumerate(path):
        if getattr(key, "key", None) == STACK:
            return index
    return None


@dataclass(frozen=True)
class ParameterInfo:
    """Description of a stored leaf, for rules about parameters.

    Attributes:
        name: Dotted stored name, for example `blocks.mixer.in_proj.kernel`.
        shape: Shape of the unstacked parameter.
        depth: Number of blocks stacked in this leaf, or None for a leaf outside the blocks.
        stack: Dotted name of the stack that the leaf is in, for example `blocks` or `decoder.blocks`, else empty.
    """

    name: str
    shape: tuple[int, ...]
    depth: int | None
    stack: str = ""

    @property
    def ndim(self) -> int:
        """Rank of the unstacked parameter."""
        return len(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading axis of blocks."""
        return self.depth is not None

    def unstacked_names(self) -> list[str]:
        """List the names of the parameters that this leaf holds."""
        if self.depth is None:
            return [self.name]
        rest = self.name.removeprefix(self.stack + ".")
        return [f"{self.stack}.{i}.{rest}" for i in range(self.depth)]


def map_parameters(fn: Callable[[ParameterInfo, Any], Any], params: Any) -> Any:
    """Map `fn(info, leaf)` over the stored leaves; the result has the structure of `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_info(path, leaf), leaf), params)


def round_products(params: Any, dtype: jnp.dtype) -> Any:
    """Return `params` with the weights of matrix products in `dtype`, the model's compute dtype; keep all others.

    This is for inference, because the model otherwise rounds these weights at every call, which takes a sixth of the
    time of a single image. The model does not round convolutions, A, D, biases, norms and the head, and this function
    keeps them, too. It rounds all other weights, also those that multiply pooled tokens, which the model with
    activations="compute" would not round.
    """

    def rounded(info: ParameterInfo, leaf: Any) -> Any:
        in_block = info.stacked and info.name.endswith(".kernel") and ".conv." not in info.name
        product = in_block or f".{info.name}".endswith(".patch_embed.proj.kernel")
        return leaf.astype(dtype) if product else leaf

    return map_parameters(rounded, params)


def parameter_infos(params: Any) -> list[ParameterInfo]:
    """List the `ParameterInfo` of every stored leaf, in the order of `jax.tree.leaves`."""
    return [_info(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def named_parameters(params: Any) -> dict[str, Any]:
    """Return the unstacked parameters by dotted name, for example `blocks.3.mixer.in_proj.kernel`."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        info = _info(path, leaf)
        parts = [leaf] if info.depth is None else list(leaf)
        flat.update(zip(info.unstacked_names(), parts, strict=True))
    return flat


def check_numbers(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Refuse weights that no training gives: complex numbers, NaN, numbers infinite in float32, and other types.

    Raises:
        UserError: naming the first entries at fault.
    """
    bad = []
    for name, array in arrays.items():
        if array.dtype.kind == "c":
            bad.append(f"{name} is complex")
        elif array.dtype.kind in "OSUM":
            bad.append(f"{name} holds no numbers ({array.dtype})")
        elif not (np.abs(np.asarray(array, np.float64)) <= np.finfo(np.float32).max).all():
            bad.append(f"{name} holds NaN or infinite numbers")
    if bad:
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(f"{where}: {'; '.join(bad[:5])}{more}.")


def replace_parameters(params: Any, flat: Mapping[str, Any]) -> Any:
    """Return `params` with every leaf taken from `flat`, in the leaf's own dtype. This inverts `named_parameters`.

    Raises:
        UserError: entries are missing, unexpected or of another shape; the message lists all of them.
    """
    problems = list_mismatches(
        {name: info.shape for info in parameter_infos(params) for name in info.unstacked_names()},
        {name: jnp.shape(value) for name, value in flat.items()},
    )
    if problems:
        raise UserError("parameters do not fit the model:\n  " + "\n  ".join(problems))

    def fill(info: ParameterInfo, leaf):
        parts = [flat[name] for name in info.unstacked_names()]
        if all(isinstance(part, np.ndarray) for part in parts):
            # In NumPy, because JAX would compile a program for every shape.
            whole = np.stack(parts) if info.stacked else parts[0]
            return jax.device_put(whole.astype(leaf.dtype))
        parts = [jnp.asarray(part, leaf.dtype) for part in parts]
        return jnp.stack(parts) if info.stacked else parts[0]

    return map_parameters(fill, params)


def list_mismatches(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """List, one per line, the names that are missing, unexpected, or given with another shape."""
    lines = [f"missing: {name} {expected[name]}" for name in expected if name not in given]
    lines += [f"unexpected: {name} {given[name]}" for name in given if name not in expected]
    lines += [
        f"shape of {name}: expected {expected[name]}, given {given[name]}"
        for name in expected
        if name in given and tuple(given[name]) != tuple(expected[name])
    ]
    return lines


def count_parameters(params: Any) -> int:
    """Count the scalars in `params`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _info(path, leaf) -> ParameterInfo:
    # A Variable adds an attribute step ("value") of its own below its path in the state.
    keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
    shape = tuple(leaf.shape)
    if stacked_key(path) is None:
        return ParameterInfo(name=".".join(keys), shape=shape, depth=None)
    return ParameterInfo(
        name=".".join(keys),
        shape=shape[1:],
        depth=shape[0],
        stack=".".join(keys[: keys.index(STACK) + 1]),
    )

"""Split a forward pass into the work on weights alone and the rest, so that calls repeat only the rest.

A program whose weights are arguments prepares them in every call: it stacks both directions' parameters, transposes the
kernels of products, computes -exp(A_log). On a GPU each such operation is a kernel of 1 to 6 microseconds, a sixteenth
of the time of one image with FastVim-T.

    split = split_weights(forward, weights, images)
    prepared = jax.jit(split.prepare)(weights)      # once
    logits = jax.jit(split.run)(prepared, images)   # equals forward(weights, images)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from pallas_kernels.derivatives import nothing_differentiated

VIEWS = ("slice", "split", "unstack", "squeeze", "reshape", "broadcast_in_dim")
"""Operations on weights that every call repeats. Kernels read slices of a stacked array where it lies, while every
argument costs the host time; and a broadcast array takes longer to read than to repeat."""

PARTS = ("slice", "split", "unstack")
MANY, LARGE = 2**22, 2**15
"""Calls with at least `MANY` numbers beside the weights (28 images of 224 pixels) get each matrix with at least `LARGE`
entries, out of a stacked array, as an argument of its own. For so many tokens XLA takes products of cuBLAS, which
cannot read a slice, and would copy the matrix in every call: 2 microseconds a block of FastVim-T, 5 of -S and 7 of -B.
"""


class Split(NamedTuple):
    """The two parts of a function.

    Attributes:
        prepare: `prepare(weights)` returns a list of arrays, for `run`.
        run: `run(prepared, *arguments)` returns what the function returns.
    """

    prepare: Callable[[Any], list[jax.Array]]
    run: Callable[..., Any]


def split_weights(function: Callable[..., Any], weights: Any, *arguments: Any) -> Split:
    """Split `function(weights, *arguments)` into what depends on the weights alone and the rest.

    Both parts compute the same operations as the function, so results differ at most by how XLA fuses them. They hold
    for arguments of the given shapes only. Large calls get the blocks' matrices one by one (see `MANY`). Differentiate
    the function and not these parts, which hold the forms that are fastest without a gradient.

    Args:
        function: traceable by JAX, without side effects.
        weights: pytree of arrays, or of their `jax.ShapeDtypeStruct`.
        arguments: further pytrees of the same kind.
    """
    with nothing_differentiated():
        closed, result = jax.make_jaxpr(function, return_shape=True)(weights, *arguments)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(result)
    count = len(jax.tree.leaves(weights))
    given, others = jaxpr.invars[:count], jaxpr.invars[count:]
    apart = sum(math.prod(_shape(var)) for var in others) >= MANY
    early, late, kept = _split(jaxpr, count, apart)

    def part(equations: list[JaxprEqn], inputs: list[Var], outputs: list[Any]) -> Callable:
        chosen = jaxpr.replace(eqns=equations, invars=inputs, outvars=outputs)
        return jaxpr_as_fun(ClosedJaxpr(chosen, closed.consts))

    first = part(early, given, kept)
    second = part(late, [*kept, *others], jaxpr.outvars)

    def prepare(weights: Any) -> list[jax.Array]:
        return list(first(*jax.tree.leaves(weights)))

    def run(prepared: Sequence[jax.Array], *arguments: Any) -> Any:
        return jax.tree.unflatten(structure, second(*prepared, *jax.tree.leaves(arguments)))

    return Split(prepare, run)


def _split(
    jaxpr: Jaxpr, count: int, apart: bool
) -> tuple[list[JaxprEqn], list[JaxprEqn], list[Var]]:
    """Return the equations of both parts and the variables that pass between them.

    Of the inputs, `count` are weights. `apart` keeps large parts of stacked arrays one by one.
    """
    weights = jaxpr.invars[:count]
    known, derived, stored = {*jaxpr.constvars, *weights}, set(weights), set(weights)
    for eqn in jaxpr.eqns:
        # An equation without inputs may ask for the platform for which the program is lowered.
        if not eqn.invars or eqn.effects or not all(var in known for var in _variables(eqn.invars)):
            continue
        known.update(eqn.outvars)
        if any(var in derived for var in _variables(eqn.invars)):
            derived.update(eqn.outvars)
            view = eqn.primitive.name in VIEWS
            part = apart and eqn.primitive.name in PARTS
            stored.update(v for v in eqn.outvars if not view or (part and _is_large_matrix(v)))
    late = needed(jaxpr.eqns, jaxpr.outvars, stored)
    read = [var for eqn in late for var in _variables(eqn.invars)] + _variables(jaxpr.outvars)
    kept = [var for var in dict.fromkeys(read) if var in stored]
    return needed(jaxpr.eqns, kept, set()), late, kept


def _is_large_matrix(var: Var) -> bool:
    """Tell matrices of products, also several of a block, from decays, whose 16 states are no inputs or outputs."""
    shape = _shape(var)
    return math.prod(shape) >= LARGE and len(shape) >= 2 and min(shape[-2:]) > 16


def _shape(var: Var) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())


def needed(equations: Sequence[JaxprEqn], wanted: Iterable[Any], given: set[Var]) -> list[JaxprEqn]:
    """List the equations that compute the wanted variables from those given and from the inputs."""
    missing = set(_variables(wanted)) - given
    chosen = []
    for eqn in reversed(equations):
        if not missing.isdisjoint(eqn.outvars):
            chosen.append(eqn)
            missing.update(var for var in _variables(eqn.invars) if var not in given)
    return chosen[::-1]


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]

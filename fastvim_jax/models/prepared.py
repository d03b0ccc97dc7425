"""Split a forward pass into the work on weights alone and the rest, so that calls repeat only the rest.

A program whose weights are arguments prepares them in every call: it stacks both directions' parameters, transposes the
kernels of products, computes -exp(A_log). On a GPU each such operation is a kernel of 1 to 6 microseconds, a sixteenth
of the time of one image with FastVim-T.

    split = split_weights(forward, weights, images)
    prepared = jax.jit(split.prepare)(weights)      # once
    logits = jax.jit(split.run)(prepared, images)   # equals forward(weights, images)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

VIEWS = ("slice", "split", "unstack", "squeeze", "reshape", "broadcast_in_dim")
"""Operations on weights that every call repeats. Kernels read slices of a stacked array where it lies, while every
argument costs the host time; and a broadcast array takes longer to read than to repeat."""


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
    for arguments of the given shapes only.

    Args:
        function: traceable by JAX, without side effects.
        weights: pytree of arrays, or of their `jax.ShapeDtypeStruct`.
        arguments: further pytrees of the same kind.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(weights, *arguments)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(result)
    count = len(jax.tree.leaves(weights))
    given, others = jaxpr.invars[:count], jaxpr.invars[count:]
    early, late, kept = _split(jaxpr, count)

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


def _split(jaxpr: Jaxpr, count: int) -> tuple[list[JaxprEqn], list[JaxprEqn], list[Var]]:
    """Return the equations of both parts and the variables that pass between them; `count` inputs are weights."""
    weights = jaxpr.invars[:count]
    known, derived, stored = {*jaxpr.constvars, *weights}, set(weights), set(weights)
    for eqn in jaxpr.eqns:
        # An equation without inputs may ask for the platform for which the program is lowered.
        if not eqn.invars or eqn.effects or not all(var in known for var in _variables(eqn.invars)):
            continue
        known.update(eqn.outvars)
        if any(var in derived for var in _variables(eqn.invars)):
            derived.update(eqn.outvars)
            stored.update(eqn.outvars if eqn.primitive.name not in VIEWS else ())
    late = _needed(jaxpr.eqns, jaxpr.outvars, stored)
    read = [var for eqn in late for var in _variables(eqn.invars)] + _variables(jaxpr.outvars)
    kept = [var for var in dict.fromkeys(read) if var in stored]
    return _needed(jaxpr.eqns, kept, set()), late, kept


def _needed(
    equations: Sequence[JaxprEqn], wanted: Iterable[Any], given: set[Var]
) -> list[JaxprEqn]:
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

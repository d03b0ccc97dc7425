"""Loop over periods of stacked blocks, so that few arrays are copied on a GPU.

`jax.lax.scan` takes a slice of every stacked parameter for each period, from which each block of the period then takes
its own. Such a slice has several readers, so XLA copies it; and JAX saves the blocks' parameters for the backward pass,
once more. Here every block indexes the stacks by itself, so that XLA's kernels read the parameters where they lie. The
backward pass indexes the same stacks, and computes again what depends on parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from fastvim_jax.models.prepared import needed

Step = Callable[[int, Any, Any, Any], Any]


def indexed_scan(step: Step, stacked: Any, keep: Any, carry: Any, period: int) -> Any:
    """Apply all blocks to `carry` in a loop over periods, and return the last carry. Only reverse mode is supported.

    Args:
        step: `step(index in the period, params, keep, carry)` returns the next carry. It may close over no traced
            array.
        stacked: parameters, any pytree of arrays with a leading axis: a whole number of periods.
        keep: a pytree like `stacked` that gets no gradient.
        carry: any pytree of arrays.
        period: number of blocks of a period.
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]
    # A constant array, because XLA then knows every index from the loop's counter and slices stacks without a copy.
    counter = np.arange(depth // period, dtype=np.int32)
    traced: list[_Linear] = []

    def blocks(stacks: Any, i: jax.Array) -> list[Any]:
        def of(j):
            take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, period * i + j, keepdims=False)  # noqa: E731
            return jax.tree.map(take, stacks)

        return [of(j) for j in range(period)]

    def one_period(params: list[Any], keeps: list[Any], carry: Any) -> Any:
        for j in range(period):
            carry = step(j, params[j], keeps[j], carry)
        return carry

    @jax.custom_vjp
    def run(stacked: Any, keep: Any, carry: Any) -> Any:
        def body(carry, i):
            return one_period(blocks(stacked, i), blocks(keep, i), carry), None

        return jax.lax.scan(body, carry, counter)[0]

    def forward(stacked, keep, carry):
        def body(carry, i):
            given = blocks(stacked, i), blocks(keep, i)
            traced[:] = [_linearise(one_period, *given, carry)]
            return traced[0].forward(*given, carry)

        last, saved = jax.lax.scan(body, carry, counter)
        return last, (stacked, keep, saved)

    def backward(residuals, carry_bar):
        stacked, keep, saved = residuals

        def body(carry_bar, xs):
            i, saved = xs
            pull = traced[0].pull(blocks(stacked, i), blocks(keep, i), saved)
            bars, carry_bar = pull(carry_bar)
            return carry_bar, jax.tree.map(lambda *leaves: jnp.stack(leaves), *bars)

        carry_bar, bars = jax.lax.scan(body, carry_bar, (counter, saved), reverse=True)
        join = lambda leaf: leaf.reshape(depth, *leaf.shape[2:])  # noqa: E731
        return jax.tree.map(join, bars), None, carry_bar

    run.defvjp(forward, backward)
    return run(stacked, keep, carry)


class _Linear(NamedTuple):
    """A function of (params, keeps, carry) and its gradient, split at the arrays that the backward pass must be given.

    Attributes:
        forward: returns the function's result and the list of arrays to save.
        pull: `pull(params, keeps, saved)` returns the function that maps the result's gradient to those of params and
            carry.
    """

    forward: Callable[[Any, Any, Any], tuple[Any, list[jax.Array]]]
    pull: Callable[[Any, Any, list[jax.Array]], Callable[[Any], tuple[Any, Any]]]


def _linearise(function: Callable[..., Any], params: Any, keeps: Any, carry: Any) -> _Linear:
    """Trace a function and its gradient.

    An array that depends on `params` and `keeps` alone is not saved: the backward pass computes it again. An array that
    the gradient reads twice is saved once.
    """
    structures: list[Any] = []

    def run(params, keeps, carry):
        out, pull = jax.vjp(lambda params, carry: function(params, keeps, carry), params, carry)
        leaves, structure = jax.tree.flatten(pull)
        structures[:] = [jax.tree.structure(out), structure]
        return jax.tree.leaves(out), leaves

    closed: Any = jax.make_jaxpr(run)(params, keeps, carry)
    jaxpr: Jaxpr = closed.jaxpr
    given = jaxpr.invars[: len(jax.tree.leaves((params, keeps)))]
    known = _known(jaxpr.eqns, [*jaxpr.constvars, *given])
    of_out, of_pull = structures
    out, read = jaxpr.outvars[: of_out.num_leaves], jaxpr.outvars[of_out.num_leaves :]
    early = [atom for atom in read if isinstance(atom, Literal) or atom in known]
    late = list(dict.fromkeys(v for v in read if not isinstance(v, Literal) and v not in known))

    def part(equations: list[JaxprEqn], inputs: list[Var], outputs: list[Any]) -> Callable:
        chosen = jaxpr.replace(eqns=equations, invars=inputs, outvars=outputs)
        return jaxpr_as_fun(ClosedJaxpr(chosen, closed.consts))

    first = part(jaxpr.eqns, jaxpr.invars, [*out, *late])
    again = part(needed(jaxpr.eqns, early, set()), given, early)

    def forward(params, keeps, carry):
        results = first(*jax.tree.leaves((params, keeps, carry)))
        return jax.tree.unflatten(of_out, results[: len(out)]), list(results[len(out) :])

    def pull(params, keeps, saved):
        computed = iter(again(*jax.tree.leaves((params, keeps))))
        by_variable = dict(zip(late, saved, strict=True))
        leaves = [
            next(computed) if isinstance(atom, Literal) or atom in known else by_variable[atom]
            for atom in read
        ]
        return jax.tree.unflatten(of_pull, leaves)

    return _Linear(forward, pull)


def _known(equations: Sequence[JaxprEqn], given: Sequence[Var]) -> set[Var]:
    """Return the variables that depend on those given and on no other input."""
    known = set(given)
    for equation in equations:
        read = [atom for atom in equation.invars if not isinstance(atom, Literal)]
        if not equation.effects and all(variable in known for variable in read):
            known.update(equation.outvars)
    return known

"""Scan by `lax.scan`, one step after another: the least work, but a loop with as many steps as tokens.

Sums are written as products of small matrices, because XLA's CPU backend runs a sum over any axis 3 to 50 times slower
than the same sum as a `dot`. The loop is not unrolled, because XLA would fuse several steps and recompute exponentials,
which is 2 to 8 times slower.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.exponential import LOG2E, exp2
from pallas_kernels.selective_scan import chunks


def _dot(subscripts: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    """Compute the einsum of a state and weights that lack some of its axes."""
    if any(axis is not None for axis in jax.typeof(x).sharding.spec):
        # On a mesh with explicit axes, JAX derives the sharding of a sum over a sharded axis, but not of a product.
        operands, out = subscripts.split("->")
        of_x, of_weights = operands.split(",")
        missing = [i for i, letter in enumerate(of_x) if letter not in of_weights]
        summed = [i for i, letter in enumerate(of_x) if letter not in out]
        return jnp.sum(x * jnp.expand_dims(weights, missing), axis=summed)
    # On GPUs the default precision of float32 products is TF32.
    return jnp.einsum(subscripts, x, weights, precision=lax.Precision.HIGHEST)


def _decay(step: jax.Array, A: jax.Array) -> jax.Array:
    if step.dtype != jnp.float32:
        return jnp.exp(step[..., None, :] * A)
    return exp2(step[..., None, :] * (A * LOG2E))


class _Sequential:
    def forward(self, step, v, A, B, C, h, *, reverse, every):
        def visit(h, x):
            step, v, B, C = x
            h = _decay(step, A) * h + v[..., None, :] * B[..., None]
            return h, _dot("bgnk,bgn->bgk", h, C)

        entering = h[None]
        h, s = lax.scan(visit, h, (step, v, B, C), reverse=reverse)
        return s, h, entering

    def backward(self, step, v, A, B, C, h, s_bar, h_bar, *, reverse, want_s):
        def visit(h, x):
            step, v, B, C, s_bar = x
            h_next = _decay(step, A) * h + v[..., None, :] * B[..., None]
            s = _dot("bgnk,bgn->bgk", h_next, C) if want_s else None
            return h_next, (h, _dot("bgnk,bgk->bgn", h_next, s_bar), s)

        _, (h, C_bar, s) = lax.scan(visit, h, (step, v, B, C, s_bar), reverse=reverse)

        def unvisit(carry, x):
            h_bar, A_bar = carry
            step, v, B, C, h, s_bar = x
            h_bar = h_bar + s_bar[..., None, :] * C[..., None]
            v_bar = _dot("bgnk,bgn->bgk", h_bar, B)
            B_bar = _dot("bgnk,bgk->bgn", h_bar, v)
            h_bar = h_bar * _decay(step, A)
            exponent_bar = h_bar * h
            step_bar = _dot("bgnk,n->bgk", exponent_bar * A, jnp.ones(A.shape[1], A.dtype))
            A_bar = A_bar + exponent_bar * step[..., None, :]  # summed over b after the loop
            return (h_bar, A_bar), (step_bar, v_bar, B_bar)

        (h_bar, A_bar), (step_bar, v_bar, B_bar) = lax.scan(
            unvisit, (h_bar, jnp.zeros_like(h[0])), (step, v, B, C, h, s_bar), reverse=not reverse
        )
        A_bar = _dot("bgnk,b->gnk", A_bar, jnp.ones(A_bar.shape[0], A.dtype))
        return step_bar, v_bar, A_bar, B_bar, C_bar, h_bar, s


_CORE = _Sequential()
forward = functools.partial(chunks.forward, _CORE, 1)
backward = functools.partial(chunks.backward, _CORE, 1)

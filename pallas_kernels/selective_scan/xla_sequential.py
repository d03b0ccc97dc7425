"""The scan as `lax.scan`, one step after another: the least work, a loop of as many steps as tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.selective_scan import chunks


class _Sequential:
    def forward(self, step, v, A, B, C, h, *, reverse, every):
        def visit(h, x):
            h = _next(h, x, A)
            return h, jnp.sum(h * x[3][..., None], axis=-2)

        entering = h[None]
        h, s = lax.scan(visit, h, (step, v, B, C), reverse=reverse)
        return s, h, entering

    def backward(self, step, v, A, B, C, h, s_bar_of, h_bar, *, reverse):
        def visit(h, x):
            h_next = _next(h, x, A)
            return h_next, (h, jnp.sum(h_next * x[3][..., None], axis=-2))

        _, (h, s) = lax.scan(visit, h, (step, v, B, C), reverse=reverse)
        s_bar, *others = s_bar_of(s)

        def unvisit(carry, x):
            h_bar, A_bar = carry
            step, v, B, C, h, s_bar = x
            decay = jnp.exp(step[..., None, :] * A)
            decayed = decay * h
            h_next = decayed + v[..., None, :] * B[..., None]
            h_bar = h_bar + s_bar[..., None, :] * C[..., None]
            exponent_bar = h_bar * decayed
            gradients = (
                jnp.sum(exponent_bar * A, axis=-2),
                jnp.sum(h_bar * B[..., None], axis=-2),
                jnp.sum(h_bar * v[..., None, :], axis=-1),
                jnp.sum(h_next * s_bar[..., None, :], axis=-1),
            )
            A_bar = A_bar + jnp.sum(exponent_bar * step[..., None, :], axis=0)
            return (h_bar * decay, A_bar), gradients

        (h_bar, A_bar), (step_bar, v_bar, B_bar, C_bar) = lax.scan(
            unvisit, (h_bar, jnp.zeros_like(A)), (step, v, B, C, h, s_bar), reverse=not reverse
        )
        return step_bar, v_bar, A_bar, B_bar, C_bar, h_bar, others


def _next(h: jax.Array, x: tuple[jax.Array, ...], A: jax.Array) -> jax.Array:
    step, v, B, _ = x
    return jnp.exp(step[..., None, :] * A) * h + v[..., None, :] * B[..., None]


_CORE = _Sequential()
forward = functools.partial(chunks.forward, _CORE, 1)
backward = functools.partial(chunks.backward, _CORE, 1)

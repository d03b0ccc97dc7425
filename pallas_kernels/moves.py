"""Move the tokens of each sample to other places, as an array says."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gather_tokens(x: jax.Array, places: jax.Array) -> jax.Array:
    """Take the tokens of x `b l d` at `places` `b k` of each sample."""
    return jnp.take_along_axis(x, places[:, :, None], axis=1, mode="promise_in_bounds")


@jax.custom_vjp
def move_tokens(x: jax.Array, places: jax.Array, back: jax.Array) -> jax.Array:
    """Take tokens as `gather_tokens` does, but compute the gradient by a gather, where JAX would use a scatter.

    Args:
        x: `b k d`.
        places: index in x of each token of the result, `b l`.
        back: index in the result of each token of x, whose gradient it gets, `b k`.
    """
    return gather_tokens(x, places)


move_tokens.defvjp(
    lambda x, places, back: (gather_tokens(x, places), back),
    lambda back, gradient: (gather_tokens(gradient, back), None, None),
)

"""Define the selective scan, one step after another, differentiated by JAX itself.

For every batch entry, channel e (of group g) and state n, for the steps t in the order in which they are visited:

    step_t = softplus(delta_t + delta_bias)
    h_t    = exp(step_t A) h_{t-1} + step_t B_t u_t,     h_0 = initial_state or 0
    y_t    = (sum over n of C_t h_t  +  D u_t) SiLU(z_t)

(Gu and Dao 2023, "Mamba", equations 2-4 with the simplified discretisation of its code. softplus, bias, D and z are
optional.) It is slow, and it keeps every state for the gradient. Use it to check other implementations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions
from pallas_kernels.sharding import mark_varying


def scan(inputs: ScanInputs, options: ScanOptions) -> tuple[jax.Array, jax.Array]:
    """Return y `b l e` in u's dtype and the last state `b e n` in float32 or wider."""
    wide = inputs.wide_dtype
    wide_inputs = (None if x is None else x.astype(wide) for x in inputs)
    u, delta, A, B, C, D, z, delta_bias, initial_state = wide_inputs
    channels_per_group = u.shape[-1] // B.shape[2]
    B = jnp.repeat(B, channels_per_group, axis=2)  # b l e n
    C = jnp.repeat(C, channels_per_group, axis=2)
    if delta_bias is not None:
        delta = delta + delta_bias
    step = jax.nn.softplus(delta) if options.delta_softplus else delta

    def visit(h, x):
        step_t, u_t, B_t, C_t = x
        h = jnp.exp(step_t[..., None] * A) * h + (step_t * u_t)[..., None] * B_t
        return h, jnp.sum(h * C_t, axis=-1)

    h0 = jnp.zeros((u.shape[0], *A.shape), wide) if initial_state is None else initial_state
    h0 = mark_varying(h0, (step, u, A, B, C))
    time_major = [jnp.moveaxis(x, 1, 0) for x in (step, u, B, C)]
    last_state, y = jax.lax.scan(visit, h0, time_major, reverse=options.reverse)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * jax.nn.silu(z)
    return y.astype(inputs.u.dtype), last_state

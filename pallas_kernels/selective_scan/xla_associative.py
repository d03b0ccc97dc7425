"""Scan by `jax.lax.associative_scan`, run by run of the time axis: logarithmic depth, about twice the work.

The recurrence h <- a h + x composes as (a2, x2) after (a1, x1) = (a2 a1, a2 x1 + x2)  (Blelloch 1990).
Nothing is divided, so a decay that underflows to zero is exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.selective_scan import chunks
from pallas_kernels.selective_scan.types import ScanForward, ScanInputs, ScanOptions

# Largest number of states of one run, unless a single chunk has more: 64 MB in float32.
RUN_STATES = 2**24
# Batch size for which runs are cut if it is symbolic, as in an exported program.
NOMINAL_BATCH = 32


def _recurrence(a, x, h, reverse: bool, *, written_out: bool = True):
    """Compute all states `t b g n k` of h <- a h + x.

    Unless `written_out`, XLA fuses the scan's last levels into the operations that read the states, and computes them
    again for each. On an H100 this is up to twice as slow, except for the gradients' recurrence.
    """

    def after(first, second):
        a1, x1 = first
        a2, x2 = second
        return a2 * a1, a2 * x1 + x2

    scanned = lax.associative_scan(after, (a, x), reverse=reverse)
    a, x = lax.optimization_barrier(scanned) if written_out else scanned
    return a * h + x


def _shift(x, first, reverse: bool):
    """Return the entry before each entry, in the order of visits. Before the first entry stands `first`."""
    if reverse:
        return jnp.concatenate([x[1:], first[None]])
    return jnp.concatenate([first[None], x[:-1]])


class _Associative:
    def forward(self, step, v, A, B, C, h, *, reverse, every):
        decay = jnp.exp(step[..., None, :] * A)
        states = _recurrence(decay, v[..., None, :] * B[..., None], h, reverse)
        s = jnp.sum(states * C[..., None], axis=-2)
        if reverse:
            return s, states[0], jnp.concatenate([states[every::every], h[None]])
        return s, states[-1], jnp.concatenate([h[None], states[every - 1 : -1 : every]])

    def backward(self, step, v, A, B, C, h, s_bar, h_bar, *, reverse, want_s):
        decay = jnp.exp(step[..., None, :] * A)
        states = _recurrence(decay, v[..., None, :] * B[..., None], h, reverse)
        # h_bar_t = C_t s_bar_t + decay_{t+1} h_bar_{t+1}, entered with decay 1.
        next_decay = _shift(decay, jnp.ones_like(h_bar), not reverse)
        added = s_bar[..., None, :] * C[..., None]
        states_bar = _recurrence(next_decay, added, h_bar, not reverse, written_out=False)
        exponent_bar = states_bar * decay * _shift(states, h, reverse)
        first = -1 if reverse else 0
        return (
            jnp.sum(exponent_bar * A, axis=-2),
            jnp.sum(states_bar * B[..., None], axis=-2),
            jnp.sum(exponent_bar * step[..., None, :], axis=(0, 1)),
            jnp.sum(states_bar * v[..., None, :], axis=-1),
            jnp.sum(states * s_bar[..., None, :], axis=-1),
            decay[first] * states_bar[first],
            jnp.sum(states * C[..., None], axis=-2) if want_s else None,
        )


_CORE = _Associative()


def _chunks_per_run(inputs: ScanInputs, options: ScanOptions) -> int:
    batch = inputs.u.shape[0] if isinstance(inputs.u.shape[0], int) else NOMINAL_BATCH
    states = batch * inputs.A.size * options.chunk
    return max(1, RUN_STATES // max(1, states))


def forward(inputs: ScanInputs, options: ScanOptions) -> ScanForward:
    """See `types.Backend`."""
    return chunks.forward(_CORE, _chunks_per_run(inputs, options), inputs, options)


def backward(
    inputs: ScanInputs,
    options: ScanOptions,
    boundaries: jax.Array | None,
    y_bar: jax.Array,
    last_state_bar: jax.Array | None,
) -> ScanInputs:
    """See `types.Backend`."""
    group = _chunks_per_run(inputs, options)
    return chunks.backward(_CORE, group, inputs, options, boundaries, y_bar, last_state_bar)

"""Run a scan chunk by chunk, forward and backward, with a backend (`Core`) that computes one chunk.

The forward pass saves only the inputs and the state that enters each chunk. The backward pass visits the chunks in the
opposite order and recomputes the states of one chunk at a time. So the array of all states, `b l e n`, never exists:
peak memory is the states of one chunk plus one state per chunk.

Inside, arrays are time-major and float32 or wider. Channels `e` are split into `g` groups of `k` channels. The state is
`b g n k`: channels come last, so that the sum over n adds vectors of channels.

Names: a *chunk* is the unit between two saved states, a *run* is the `group` chunks that one call of the backend
computes. `x_bar` is the gradient of `x`. The steps from delta to the backend's inputs are `_before`, those from its
output to y `_after`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.selective_scan.types import ScanForward, ScanInputs, ScanOptions
from pallas_kernels.softplus import softplus


@runtime_checkable
class Core(Protocol):
    """Describe a backend, which computes t steps of  h <- exp(step A) h + v B,  s = sum over n of C h."""

    def forward(
        self,
        step: Float[Array, "t b g k"],
        v: Float[Array, "t b g k"],
        A: Float[Array, "g n k"],
        B: Float[Array, "t b g n"],
        C: Float[Array, "t b g n"],
        h: Float[Array, "b g n k"],
        *,
        reverse: bool,
        every: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return s `t b g k`, the last state, and the states before every `every`-th step."""
        ...

    def backward(
        self,
        step: Float[Array, "t b g k"],
        v: Float[Array, "t b g k"],
        A: Float[Array, "g n k"],
        B: Float[Array, "t b g n"],
        C: Float[Array, "t b g n"],
        h: Float[Array, "b g n k"],
        s_bar: Float[Array, "t b g k"],
        h_bar: Float[Array, "b g n k"],
        *,
        reverse: bool,
        want_s: bool,
    ) -> tuple[jax.Array | None, ...]:
        """Return the gradients of step, v, A, B, C and h, then s if `want_s`, otherwise None."""
        ...


class Steps(NamedTuple):
    """Hold the inputs with a time axis, in the caller's dtype, time-major: `t b g k` or `t b g n`."""

    u: jax.Array
    delta: jax.Array
    B: jax.Array
    C: jax.Array
    z: jax.Array | None
    valid: jax.Array | None  # t: False on padding; None when there is none


class Weights(NamedTuple):
    """Hold the inputs without a time axis, in float32 or wider: A `g n k`, D and delta_bias `g k`."""

    A: jax.Array
    D: jax.Array | None
    delta_bias: jax.Array | None


def chunk_length(length: int) -> int:
    """Choose the number of steps per chunk, at most max(64, √length).

    A scan of up to 64 steps is one chunk. Longer ones are cut into equal chunks (196 steps are 4 chunks of 49), so that
    little is padded. With chunks of 64 steps the saved states take n / 64 of u's memory. Beyond 4096 steps, √length
    balances the memory of the saved states against that of the states of the current chunk.
    """
    limit = max(64, math.isqrt(length))
    return math.ceil(length / math.ceil(length / limit))


def _split(x: jax.Array, groups: int) -> jax.Array:
    # For one group add an axis instead of reshaping, because this keeps the sharding of the channels.
    return (
        x[..., None, :] if groups == 1 else x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    )


def _join(x: jax.Array) -> jax.Array:
    return x[..., 0, :] if x.shape[-2] == 1 else lax.collapse(x, x.ndim - 2)


class Layout(NamedTuple):
    """Say how a scan is cut: into `runs` runs of `group` chunks of `chunk` steps; the last run is padded."""

    length: int
    chunk: int
    group: int
    runs: int
    groups: int

    @property
    def chunks(self) -> int:
        return math.ceil(self.length / self.chunk)

    def steps(self, x: jax.Array) -> jax.Array:
        """Pad and reshape `b l ...` to `runs t b ...`."""
        padding = self.runs * self.group * self.chunk - self.length
        if padding:
            x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(self.runs, self.group * self.chunk, *x.shape[1:])

    def sequence(self, x: jax.Array) -> jax.Array:
        """Reshape `runs t b ...` to `b l ...` and remove the padding."""
        x = lax.collapse(x, 0, 2)[: self.length]
        return jnp.moveaxis(x, 0, 1)


def _layout(inputs: ScanInputs, options: ScanOptions, group: int) -> Layout:
    length = inputs.u.shape[1]
    chunks = math.ceil(length / options.chunk)
    runs = math.ceil(chunks / group)
    group = math.ceil(chunks / runs)
    return Layout(length, options.chunk, group, math.ceil(chunks / group), inputs.B.shape[2])


def _prepare(inputs: ScanInputs, layout: Layout) -> tuple[Steps, Weights]:
    wide = inputs.wide_dtype
    g = layout.groups
    total = layout.runs * layout.group * layout.chunk
    valid = None
    if total != layout.length:
        valid = (jnp.arange(total) < layout.length).reshape(layout.runs, -1)
    steps = Steps(
        layout.steps(_split(inputs.u, g)),
        layout.steps(_split(inputs.delta, g)),
        layout.steps(inputs.B),
        layout.steps(inputs.C),
        None if inputs.z is None else layout.steps(_split(inputs.z, g)),
        valid,
    )
    weights = Weights(
        jnp.moveaxis(_split(inputs.A.T, g), -2, 0).astype(wide),
        None if inputs.D is None else _split(inputs.D, g).astype(wide),
        None if inputs.delta_bias is None else _split(inputs.delta_bias, g).astype(wide),
    )
    return steps, weights


def _before(u, delta, delta_bias, valid, apply_softplus: bool):
    """Return the step sizes and v = step · u."""
    if delta_bias is not None:
        delta = delta + delta_bias
    step = softplus(delta) if apply_softplus else delta
    if valid is not None:  # A step size of zero leaves the state unchanged.
        step = jnp.where(valid[:, None, None, None], step, 0)
    return step, step * u


def _after(s, u, z, D):
    if D is not None:
        s = s + D * u
    return s if z is None else s * jax.nn.silu(z)


def forward(core: Core, group: int, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
    """Scan with the backend `core`, calling it once for every run of `group` chunks."""
    wide = inputs.wide_dtype
    layout = _layout(inputs, options, group)
    steps, weights = _prepare(inputs, layout)
    keep = options.keep_boundaries and layout.chunks > 1

    def run(h, x: Steps):
        u, delta, B, C, z = (None if a is None else a.astype(wide) for a in x[:5])
        step, v = _before(u, delta, weights.delta_bias, x.valid, options.delta_softplus)
        s, h, entering = core.forward(
            step, v, weights.A, B, C, h, reverse=options.reverse, every=options.chunk
        )
        y = _after(s, u, z, weights.D).astype(inputs.u.dtype)
        return h, (y, entering if keep else None)

    h, (y, boundaries) = _scan_runs(
        run, _initial_state(inputs, layout, steps, weights), steps, options.reverse
    )
    y = _join(layout.sequence(y))
    last_state = _state_out(h) if options.return_last_state else None
    if not keep:
        return y, last_state, None
    boundaries = lax.collapse(boundaries, 0, 2)[: layout.chunks]
    return y, last_state, jnp.moveaxis(jax.vmap(_state_out)(boundaries), 0, 1)


def backward(
    core: Core,
    group: int,
    inputs: ScanInputs,
    options: ScanOptions,
    boundaries: jax.Array | None,
    y_bar: jax.Array,
    last_state_bar: jax.Array | None,
) -> ScanInputs:
    """Compute the gradients of `forward`."""
    wide = inputs.wide_dtype
    layout = _layout(inputs, options, group)
    steps, weights = _prepare(inputs, layout)
    y_bar = layout.steps(_split(y_bar, layout.groups))
    if boundaries is None:
        entering = _initial_state(inputs, layout, steps, weights)[None]
    else:  # Pick the state that enters each run: that of its first chunk in scan order.
        padding = layout.runs * layout.group - layout.chunks
        entering = jnp.pad(boundaries, [(0, 0), (0, padding), (0, 0), (0, 0)])
        first = layout.group - 1 if options.reverse else 0
        entering = jnp.moveaxis(entering[:, first :: layout.group], 1, 0)
        entering = jax.vmap(lambda h: _state_in(h, layout.groups))(entering)
    if last_state_bar is None:
        h_bar = _zero_state(steps, weights)
    else:
        h_bar = _state_in(last_state_bar, layout.groups)

    def run(carry, x):
        h_bar, weights_bar = carry
        x, h, y_bar = x
        u, delta, B, C, z = (None if a is None else a.astype(wide) for a in x[:5])

        def before(u, delta, delta_bias):
            return _before(u, delta, delta_bias, x.valid, options.delta_softplus)

        (step, v), pull_before = jax.vjp(before, u, delta, weights.delta_bias)
        y_bar = y_bar.astype(wide)
        s_bar = y_bar if z is None else y_bar * jax.nn.silu(z)
        step_bar, v_bar, A_bar, B_bar, C_bar, h_bar, s = core.backward(
            step, v, weights.A, B, C, h, s_bar, h_bar,
            reverse=options.reverse, want_s=z is not None,
        )  # fmt: skip
        # Without a gate, y is linear in s: the gradients do not depend on the value of s.
        s = jnp.zeros_like(s_bar) if s is None else s
        _, pull_after = jax.vjp(functools.partial(_after, s), u, z, weights.D)
        u_bar, z_bar, D_bar = pull_after(y_bar)
        u_bar_before, delta_bar, bias_bar = pull_before((step_bar, v_bar))
        steps_bar = (u_bar + u_bar_before, delta_bar, B_bar, C_bar, z_bar)
        steps_bar = jax.tree.map(lambda g, a: g.astype(a.dtype), steps_bar, tuple(x[:5]))
        weights_bar = jax.tree.map(jnp.add, weights_bar, Weights(A_bar, D_bar, bias_bar))
        return (h_bar, weights_bar), steps_bar

    zeros = jax.tree.map(jnp.zeros_like, weights)
    (h_bar, weights_bar), steps_bar = _scan_runs(
        run, (h_bar, zeros), (steps, entering, y_bar), not options.reverse
    )
    u_bar, delta_bar, B_bar, C_bar, z_bar = jax.tree.map(layout.sequence, steps_bar)
    gradients = ScanInputs(
        u=_join(u_bar),
        delta=_join(delta_bar),
        A=_join(jnp.moveaxis(weights_bar.A, 0, -2)).T,
        B=B_bar,
        C=C_bar,
        D=None if inputs.D is None else _join(weights_bar.D),
        z=None if inputs.z is None else _join(z_bar),
        delta_bias=None if inputs.delta_bias is None else _join(weights_bar.delta_bias),
        initial_state=None if inputs.initial_state is None else _state_out(h_bar),
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, inputs)


def _zero_state(steps: Steps, weights: Weights) -> jax.Array:
    # Compute the zeros from the operands, so that under a mesh they have the sharding of the scan's carry.
    delta = steps.delta[0, 0].astype(weights.A.dtype)
    return jnp.zeros_like(delta[:, :, None, :] * weights.A)


def _initial_state(inputs: ScanInputs, layout: Layout, steps: Steps, weights: Weights) -> jax.Array:
    zero = _zero_state(steps, weights)
    if inputs.initial_state is None:
        return zero
    return _state_in(inputs.initial_state.astype(zero.dtype), layout.groups)


def _state_out(h: jax.Array) -> jax.Array:
    """Reshape a state from `b g n k` to `b e n`."""
    return jnp.swapaxes(_join(jnp.moveaxis(h, 1, -2)), 1, 2)


def _state_in(h: jax.Array, groups: int) -> jax.Array:
    """Reshape a state from `b e n` to `b g n k`."""
    return jnp.moveaxis(_split(jnp.swapaxes(h, 1, 2), groups), -2, 1)


def _scan_runs(run, carry, xs, reverse: bool):
    # Run a single run without a loop, so that XLA can fuse it with the operations around the scan.
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return lax.scan(run, carry, xs, reverse=reverse)
    carry, ys = run(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)

"""Run both directions of a mixer by a backend that knows one direction: `AtOnce`, or `InTurn`.

At once, the second direction's inputs are reversed and the backend is mapped over the two: a loop of steps runs once
instead of twice, and pooled scans of 14 steps spend much of their time on the loop itself. Calls of Triton kernels
cannot be mapped and run in turn.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.types import Backend, ScanForward, ScanInputs, ScanOptions

DIRECTIONS = (0, 1)  # the second visits the steps from last to first


def of_direction(
    inputs: ScanInputs, options: ScanOptions, direction: int
) -> tuple[ScanInputs, ScanOptions]:
    """Select one direction's scan from both directions' inputs."""
    own = jax.tree.map(lambda x: x[direction], inputs)
    return own, dataclasses.replace(options, reverse=bool(direction))


@dataclasses.dataclass(frozen=True)
class AtOnce:
    """A backend of both directions in one loop: `types.Backend` describes its methods."""

    backend: Backend

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """See `types.Backend`."""
        run = jax.vmap(lambda inputs: self.backend.forward(inputs, options))
        y, _, boundaries = run(_as_visited(inputs))
        return (y[0], jnp.flip(y[1], 1)), None, boundaries

    def backward(self, inputs, options, boundaries, y_bar, last_state_bar) -> ScanInputs:
        """See `types.Backend`."""

        def run(inputs, boundaries, y_bar):
            return self.backend.backward(inputs, options, boundaries, y_bar, last_state_bar)

        forward, backward = y_bar
        bars = jnp.stack([forward, jnp.flip(backward, 1)])
        return _as_visited(jax.vmap(run)(_as_visited(inputs), boundaries, bars))


@dataclasses.dataclass(frozen=True)
class InTurn:
    """A backend of both directions that runs one after the other: `types.Backend` describes its methods."""

    backend: Backend

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """See `types.Backend`."""
        runs = [self.backend.forward(*of_direction(inputs, options, d)) for d in DIRECTIONS]
        y, _, boundaries = zip(*runs, strict=True)
        return y, None, None if boundaries[0] is None else jnp.stack(boundaries)

    def backward(self, inputs, options, boundaries, y_bar, last_state_bar) -> ScanInputs:
        """See `types.Backend`."""
        bars = [
            self.backend.backward(
                *of_direction(inputs, options, d),
                None if boundaries is None else boundaries[d],
                y_bar[d],
                last_state_bar,
            )
            for d in DIRECTIONS
        ]
        return jax.tree.map(lambda *bars: jnp.stack(bars), *bars)


def _as_visited(inputs: ScanInputs) -> ScanInputs:
    """Reverse the steps of the second direction."""
    turn = lambda x: x if x is None else jnp.stack([x[0], jnp.flip(x[1], 1)])  # noqa: E731
    steps = {name: turn(getattr(inputs, name)) for name in ("u", "delta", "B", "C", "z")}
    return inputs._replace(**steps)

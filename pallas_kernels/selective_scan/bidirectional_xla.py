"""Run both directions of a mixer, one after the other, by a backend for one direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

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


def rounded(y: Iterable[jax.Array], options: ScanOptions) -> tuple[jax.Array, jax.Array]:
    """Round both directions' outputs to the dtype that the options name."""
    forward, backward = (side.astype(options.y_dtype or side.dtype) for side in y)
    return forward, backward


@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """Make a backend for both directions (see `types.Backend`) from a backend for one."""

    backend: Backend

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """See `types.Backend`."""
        runs = [self.backend.forward(*of_direction(inputs, options, d)) for d in DIRECTIONS]
        y, _, boundaries = zip(*runs, strict=True)
        return rounded(y, options), None, None if boundaries[0] is None else jnp.stack(boundaries)

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

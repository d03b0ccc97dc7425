"""What passes between the public function, the derivative rule and the backends."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dtypes import wide_dtype


class ScanInputs(NamedTuple):
    """Every array of one scan, as the caller gave it (its own dtype), except that B and C always have groups.

    Also carries the gradients, entry by entry; absent inputs are None in both. The scans of both directions of a
    mixer, the first forward, the second in reverse, are one value with a further leading axis of two on every array.
    """

    u: Float[Array, "b l e"]
    delta: Float[Array, "b l e"]
    A: Float[Array, "e n"]
    B: Float[Array, "b l g n"]
    C: Float[Array, "b l g n"]
    D: Float[Array, " e"] | None
    z: Float[Array, "b l e"] | None
    delta_bias: Float[Array, " e"] | None
    initial_state: Float[Array, "b e n"] | None = None

    @property
    def wide_dtype(self) -> jnp.dtype:
        """The dtype of the state and of all inner arithmetic: float32 or wider."""
        return wide_dtype(*jax.tree.leaves(self))


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """The static half of a call.

    chunk: number of steps between the states a forward pass leaves for the backward pass. It is part of
    the call, not of a backend, so that backends can be exchanged at lowering time.
    keep_boundaries: whether a gradient will follow, so that those states are wanted at all.
    """

    delta_softplus: bool
    reverse: bool
    return_last_state: bool
    chunk: int
    keep_boundaries: bool = True


# `b l e`; of both directions, two of them.
ScanOutput = jax.Array | tuple[jax.Array, jax.Array]

# Output, state after the last visited step (None unless asked for), and the state entering each chunk
# (None unless asked for, or when the scan is one chunk, which starts from zero): `b chunks e n`, in order of time.
ScanForward = tuple[ScanOutput, jax.Array | None, jax.Array | None]


@runtime_checkable
class Backend(Protocol):
    """A module with these two functions is an implementation; see `implementations`.

    One that takes both directions' inputs gives and takes y as a tuple of two, and states with a leading axis of two;
    neither gate nor last state are asked of it, and `options.reverse` says nothing.
    """

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """Run the scan, leaving the state that enters each chunk for `backward`."""
        ...

    def backward(
        self,
        inputs: ScanInputs,
        options: ScanOptions,
        boundaries: jax.Array | None,
        y_bar: ScanOutput,
        last_state_bar: Float[Array, "b e n"] | None,
    ) -> ScanInputs:
        """Gradients with respect to every input, each in its input's dtype."""
        ...

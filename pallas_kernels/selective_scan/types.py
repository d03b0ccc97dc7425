"""Types that pass between the public function, the derivative rule and the backends."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dtypes import wide_dtype


class ScanInputs(NamedTuple):
    """Every array of one scan, in the dtype that the caller gave; B and C always have an axis of groups.

    The gradients are a `ScanInputs` as well; an input that is None has the gradient None. For both directions of a
    mixer, every array has one more leading axis of two: the first entry is scanned forward, the second in reverse.
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
    """The arguments of a scan that are not arrays.

    Attributes:
        delta_softplus, reverse, return_last_state: see `selective_scan`.
        chunk: number of steps between the states that the forward pass saves for the backward pass. It is part of the
            call and not of a backend, so that backends can be exchanged at lowering time.
        keep_boundaries: whether to return these states, because a gradient will follow.
        y_dtype: dtype of the output of both directions; None is u's. Scans of one direction have u's.
    """

    delta_softplus: bool
    reverse: bool
    return_last_state: bool
    chunk: int
    keep_boundaries: bool = True
    y_dtype: jnp.dtype | None = None


# y `b l e`; for both directions, a pair.
ScanOutput = jax.Array | tuple[jax.Array, jax.Array]

# Output, state after the last visited step (None unless asked for), and the state entering each chunk
# (None unless asked for, or when the scan is one chunk, which starts from zero): `b chunks e n`, in order of time.
ScanForward = tuple[ScanOutput, jax.Array | None, jax.Array | None]


@runtime_checkable
class Backend(Protocol):
    """A module with these two functions is an implementation; see `implementations`.

    A backend for both directions returns (and reads the gradient of) y as a pair, and states with a leading axis of
    two. It is called with neither a gate nor `return_last_state`, and ignores `options.reverse`.
    """

    def forward(self, inputs: ScanInputs, options: ScanOptions) -> ScanForward:
        """Run the scan, and save the state that enters each chunk for `backward`."""
        ...

    def backward(
        self,
        inputs: ScanInputs,
        options: ScanOptions,
        boundaries: jax.Array | None,
        y_bar: ScanOutput,
        last_state_bar: Float[Array, "b e n"] | None,
    ) -> ScanInputs:
        """Compute the gradients with respect to every input, each in its input's dtype."""
        ...

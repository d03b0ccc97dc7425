"""Pad widths to whole blocks of 128 channels: arrays get channels of zeros, which count in no norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mixer_core.types import Norm

BLOCK = 128
NARROWEST = 64  # Below this width, the kernels would spend more than half of their work on zeros.


def missing_channels(width: int) -> int:
    """Return how many channels to add for whole blocks; 0 for widths that are too narrow for the kernels."""
    return -width % BLOCK if width >= NARROWEST else 0


def widen(arrays: Any, padding: int) -> Any:
    """Add channels of zeros on the last axis of arrays."""
    one = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])  # noqa: E731
    return jax.tree.map(one, arrays) if padding else arrays


def widen_halves(xz: jax.Array, padding: int) -> jax.Array:
    """Add channels of zeros to x and to z."""
    if not padding:
        return xz
    halves = widen(xz.reshape(*xz.shape[:-1], 2, xz.shape[-1] // 2), padding)
    return halves.reshape(*xz.shape[:-1], -1)


def widen_call(xz: jax.Array, parameters: Any, norm: Norm, padding: int) -> tuple[Any, ...]:
    """Widen what a core takes: xz `b l 2e`, and parameters and norm, whose last axis is e."""
    return widen_halves(xz, padding), widen(parameters, padding), widen(norm, padding)


def on_channels(gate: Callable[..., jax.Array], padding: int) -> Callable[..., jax.Array]:
    """Return a function that applies `gate(s, z, norm)` to the real channels, and adds the channels of zeros again."""

    def run(s, z, norm):
        real = z.shape[-1] - padding
        s, z, norm = jax.tree.map(lambda x: x[..., :real], (s, z, norm))
        return widen(gate(s, z, norm), padding)

    return run


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """Apply a core's `middle` to the real channels only."""

    middle: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    padding: int

    def __call__(self, params: Any, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map wide u to wide y."""
        return widen(self.middle(params, u[..., : u.shape[-1] - self.padding]), self.padding)

"""Both directions of a mixer in one launch of the Mosaic GPU kernels.

A scan of 14 steps is over before its launch has paid off, and its last blocks leave most of the GPU idle, where
those of the other direction can run. Long ones, whose time is cut into splits, gain little beyond fewer splits, but
taking both directions' arrays apart first would cost a copy of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan import mosaic
from pallas_kernels.selective_scan.types import ScanForward, ScanInputs, ScanOptions


def _folded(inputs: ScanInputs, reshape: Callable[..., Any] = jnp.reshape) -> ScanInputs:
    """Reshape `d b ...` to `(d b) ...`: first the sequences of one direction, then the other's. Keep weights."""
    fold = lambda x: reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))  # noqa: E731
    streamed = {name: fold(getattr(inputs, name)) for name in ("u", "delta", "B", "C")}
    return inputs._replace(**streamed)


def _folded_shapes(inputs: ScanInputs) -> ScanInputs:
    return _folded(inputs, lambda x, shape: jax.ShapeDtypeStruct(shape, x.dtype))


def _unfolded(x: jax.Array) -> jax.Array:
    return x.reshape(2, -1, *x.shape[1:])


def unsupported(inputs: ScanInputs) -> str | None:
    """Return why the kernels cannot take these inputs, or None."""
    return mosaic.unsupported(_folded_shapes(inputs))


def chunk_length(inputs: ScanInputs) -> int:
    """Choose the steps between the states kept for the gradient."""
    return mosaic.chunk_length(_folded_shapes(inputs))


def forward(inputs: ScanInputs, options: ScanOptions) -> ScanForward:
    """See `types.Backend`."""
    y, _, boundaries = mosaic.forward(_folded(inputs), options)
    return y, None, None if boundaries is None else _unfolded(boundaries)


def backward(
    inputs: ScanInputs,
    options: ScanOptions,
    boundaries: jax.Array | None,
    y_bar: tuple[jax.Array, jax.Array],
    last_state_bar: None,
) -> ScanInputs:
    """See `types.Backend`."""
    if boundaries is not None:
        boundaries = boundaries.reshape(-1, *boundaries.shape[2:])
    bars = mosaic.backward(_folded(inputs), options, boundaries, y_bar, last_state_bar)
    streamed = {name: _unfolded(getattr(bars, name)) for name in ("u", "delta", "B", "C")}
    return bars._replace(**streamed)


def short_gradients(
    inputs: ScanInputs, options: ScanOptions, y_bar: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    """See `mosaic.short_gradients`; the shares of both directions' B and C lie one behind the other."""
    return mosaic.short_gradients(_folded(inputs), options, y_bar)

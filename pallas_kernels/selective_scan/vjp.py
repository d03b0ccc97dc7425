"""Define the derivative rule of the scan: save the inputs and the state that enters each chunk, recompute the rest.

The rule stands around the choice of a backend. So the backends of forward and backward pass are both chosen at lowering
time, and nothing is saved for a backend that does not run.
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from pallas_kernels.derivatives import reverse_mode_only
from pallas_kernels.selective_scan.types import Backend, ScanInputs, ScanOptions, ScanOutput


def scan(
    backend: Backend, options: ScanOptions, inputs: ScanInputs
) -> tuple[ScanOutput, jax.Array | None]:
    """Run `_scan`. If it is differentiated in forward mode, the error names an implementation that can do it."""
    with reverse_mode_only(
        "selective_scan, this implementation",
        "implementation='reference', and for whole models fastvim_jax.jvp",
    ):
        return _scan(backend, options, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    backend: Backend, options: ScanOptions, inputs: ScanInputs
) -> tuple[ScanOutput, jax.Array | None]:
    """Return y `b l e` (for both directions, a pair) and, if `options` ask for it, the last state `b e n`."""
    # Without differentiation nobody reads the states that enter the chunks.
    options = dataclasses.replace(options, keep_boundaries=False)
    y, last_state, _ = backend.forward(inputs, options)
    return y, last_state


def _forward(backend, options, inputs):
    y, last_state, boundaries = backend.forward(inputs, options)
    return (y, last_state), (inputs, boundaries)


def _backward(backend, options, residuals, cotangents):
    inputs, boundaries = residuals
    y_bar, last_state_bar = cotangents
    y_bar = jax.tree.map(lambda g: g.astype(inputs.u.dtype), y_bar)
    return (backend.backward(inputs, options, boundaries, y_bar, last_state_bar),)


_scan.defvjp(_forward, _backward)

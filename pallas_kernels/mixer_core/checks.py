"""Check the arguments of both fused cores, `mixer_core` and `sequence_core`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks import as_floats, expect_shape
from pallas_kernels.mixer_core.types import NORM_KINDS


def expect_norm_kind(operation: str, kind: str) -> None:
    """Raise ValueError if `kind` is not one of `NORM_KINDS`."""
    if kind not in NORM_KINDS:
        raise ValueError(f"{operation}: norm_kind must be one of {NORM_KINDS}; got {kind!r}")


@dataclasses.dataclass(frozen=True)
class CheckedMiddle:
    """Apply a core's `middle`, and check what it returns. Otherwise an axis of one would be repeated without a word."""

    operation: str
    middle: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]

    def __call__(self, params: Any, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map u `2 b s e` to a pair of y `b s e`; raise ValueError unless they have this shape."""
        y = self.middle(params, u)
        given = [jnp.shape(each) for each in y] if isinstance(y, tuple | list) else jnp.shape(y)
        if given != [u.shape[1:]] * 2:
            raise ValueError(
                f"{self.operation}: middle must return a pair of arrays of shape {u.shape[1:]} for u {u.shape}, "
                f"got {given}"
            )
        return y[0], y[1]


def check_arrays(
    operation: str, xz: Any, kernels: Any, biases: Any, norm: Any, D: Any = None
) -> jax.Array:
    """Return `xz` as a JAX array; check that it and the weights are floats whose shapes fit together.

    The last axis of `xz` holds x, which is convolved and scanned, and then z, which gates the result.

    Raises:
        ValueError: an argument does not fit; the message says what it must be and what it is.
    """
    xz = as_floats(operation, "xz", xz, "b l 2e")
    if min(xz.shape[1:]) < 1:
        raise ValueError(f"{operation}: no axis of xz but the batch may be empty, got {xz.shape}")
    taps = as_floats(operation, "the convolutions' kernels", kernels, "2 k e")
    e = taps.shape[2]
    if xz.shape[2] != 2 * e:
        raise ValueError(
            f"{operation}: xz {xz.shape} (b l 2e) must have twice the {e} channels of the "
            f"convolutions {taps.shape} (2 k e)"
        )
    beside = f"xz {xz.shape} (b l 2e)"
    expect_shape(
        operation, "the convolutions' kernels", taps, "2 k e", (2, *taps.shape[1:]), beside
    )
    scale, shift = norm
    for name, x, letters, shape in (
        ("the convolutions' biases", biases, "2 e", (2, e)),
        ("D", D, "2 e", (2, e)),
        ("the norm's scale", scale, "e", (e,)),
        ("the norm's shift", shift, "e", (e,)),
    ):
        if name == "D" and x is None:  # where the scans themselves add the skip connection D * x
            continue
        expect_shape(operation, name, as_floats(operation, name, x), letters, shape, beside)
    return xz

"""Define `bidirectional_scan`: the scans of both directions of a mixer as one operation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.checks import as_floats, float_dtype
from pallas_kernels.selective_scan import implementations
from pallas_kernels.selective_scan.api import _inputs
from pallas_kernels.selective_scan.chunks import chunk_length
from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions

NAME = "bidirectional_scan"


def bidirectional_scan(
    u: Float[Array, "2 b l e"],
    delta: Float[Array, "2 b l e"],
    A: Float[Array, "2 e n"],
    B: Float[Array, "2 b l *g n"],
    C: Float[Array, "2 b l *g n"],
    *,
    D: Float[Array, "2 e"] | None = None,
    delta_bias: Float[Array, "2 e"] | None = None,
    delta_softplus: bool = True,
    y_dtype: Any = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l e"], Float[Array, "b l e"]]:
    """Compute two selective scans, the first visiting the steps forward, the second from last to first.

    The result equals that of two calls of `selective_scan`, the second with `reverse=True`, and is differentiable like
    them. On Hopper GPUs both scans are one kernel, or two if their time axis is cut into parts that run side by side.
    The same holds for their gradients. Under a sharded `jit` every device scans its share of b and of e.

    Args:
        u: inputs of both directions, in stored order.
        delta, A, B, C, D, delta_bias, delta_softplus: as in `selective_scan`, for each direction.
        y_dtype: dtype to which y is rounded, once; u's unless given.
        implementation: as in `selective_scan`.

    Returns:
        y of the first and of the second direction, in `y_dtype`. They are two arrays, because callers read them
        separately, and because their gradients often are one and the same array.

    Raises:
        ValueError: a shape, rank or dtype does not fit, or the implementation's name is unknown.
        NotImplementedError: the implementation asked for by name cannot take this call.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    arrays = {
        name: None if x is None and name in ("D", "delta_bias") else as_floats(NAME, name, x)
        for name, x in given.items()
    }
    for name, x in arrays.items():
        if x is not None and (x.ndim < 1 or x.shape[0] != 2):
            raise ValueError(
                f"bidirectional_scan: the first axis of {name} must be the two directions (2), got shape {x.shape}"
            )
    if y_dtype is not None:
        y_dtype = float_dtype(NAME, "y_dtype", y_dtype)
    if arrays["u"].ndim == 4 and arrays["u"].shape[1] == 0:
        nothing = jnp.zeros(arrays["u"].shape[1:], arrays["u"].dtype)
        nothing = nothing.astype(y_dtype or nothing.dtype)
        return nothing, nothing
    first = {name: None if x is None else x[0] for name, x in arrays.items()}
    try:
        jax.eval_shape(lambda: _inputs(**first, z=None))
    except ValueError as error:
        raise ValueError(f"bidirectional_scan, one direction's arrays: {error}") from None
    if arrays["B"].ndim == 4:
        arrays |= {name: arrays[name][..., None, :] for name in "BC"}
    inputs = ScanInputs(**arrays, z=None)
    run = implementations.get(implementation, inputs)
    options = ScanOptions(
        delta_softplus=bool(delta_softplus),
        reverse=False,
        return_last_state=False,
        chunk=chunk_length(inputs.u.shape[2]),
        y_dtype=y_dtype,
    )
    return run(inputs, options)[0]

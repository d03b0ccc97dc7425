"""Compute the causal convolution as shifted multiply-adds, which XLA fuses into one pass.

`lax.conv_general_dilated` with one group per channel is far slower on CPUs. For x (64, 64, 128), width 4, float32, it
takes 24 ms of processor time forward and 1370 ms with gradients; these shifts take 0.55 and 3.2 ms (JAX 0.12.0 on an
AMD EPYC, 2026-11-23). A hand-written derivative that keeps only the inputs was no faster (3.5 ms).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.silu import silu


def conv(
    x: Float[Array, "b l e"],
    kernel: Float[Array, "k e"],
    bias: Float[Array, " e"] | None,
    *,
    activation: str | None,
    reverse: bool,
) -> Float[Array, "b l e"]:
    """Compute what `reference.conv` defines. With `reverse`, the window looks ahead, taps in reverse order."""
    wide = wide_dtype(x, kernel)
    # In a scan over blocks, kernel and bias are slices of stacked parameters. Without the barrier, XLA's CPU backend
    # fuses the slicing into this pass and then does not vectorise it: FastVim-T at 224 px took 56 ms of one core's time
    # per image instead of 29 (AVX-512 Xeon, float32, JAX 0.12.0, `benchmarks/peers/deit_cpu.py`).
    kernel, bias = lax.optimization_barrier((kernel, bias))
    width, length = kernel.shape[0], x.shape[1]
    # Pad both ends although one is used, so that the two directions of a mixer share one padded copy.
    padded = jnp.pad(x, ((0, 0), (width - 1, width - 1), (0, 0)))
    y = None
    for j in range(width):
        start = 2 * (width - 1) - j if reverse else j
        tap = lax.slice_in_dim(padded, start, start + length, axis=1).astype(wide)
        term = tap * kernel[j].astype(wide)
        y = term if y is None else y + term
    if bias is not None:
        y = y + bias.astype(wide)
    if activation == "silu":
        y = silu(y)
    return y.astype(x.dtype)

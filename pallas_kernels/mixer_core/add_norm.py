"""Define `add_norm`: the residual sum of a block and the next block's RMSNorm, behind any mixer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.checks import as_floats, expect_shape
from pallas_kernels.mixer_core import xla
from pallas_kernels.sharding import on_cuda, per_shard
from pallas_kernels.trial import Trial


def add_norm(
    update: Float[Array, "b l o"],
    residual: Float[Array, "b l o"],
    gain: Float[Array, " o"],
    *,
    norm_eps: float = 1e-6,
    keep: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, "b l o"], Float[Array, "b l o"]]:
    """Add a block's output to the residual stream, and normalise the sum for the next block.

        residual = residual + keep · update                         rounded to the dtype of `residual`
        normed   = residual / sqrt(mean over o of residual² + norm_eps) · gain

    `mixer_block` ends in the same way. One kernel computes both lines, and one their gradient, if the program is
    lowered for a Hopper or newer GPU and `add_norm_unsupported` returns None; otherwise XLA.

    Args:
        update: out_proj's result, in half precision.
        residual: residual stream. Its sum is computed in float32 or wider, and the norm reads the rounded sum.
        gain: scale of the RMSNorm.
        norm_eps: epsilon of the RMSNorm.
        keep: one factor for each image, as drop path draws them; no gradient flows to it. None for 1.

    Returns:
        The new residual stream, and its normalised tokens in the dtype of `update`.

    Raises:
        ValueError: an array is not of floats, or its shape does not fit `update`.
    """
    update = as_floats("add_norm", "update", update, "b l o")
    residual = as_floats("add_norm", "residual", residual, "b l o")
    gain = as_floats("add_norm", "gain", gain, "o")
    beside = f"update {update.shape} (b l o)"
    expect_shape("add_norm", "residual", residual, "b l o", update.shape, beside)
    expect_shape("add_norm", "gain", gain, "o", update.shape[2:], beside)
    if keep is not None:
        keep = as_floats("add_norm", "keep", keep, "b")
        expect_shape("add_norm", "keep", keep, "b", update.shape[:1], beside)
        keep = lax.stop_gradient(keep.astype(xla.at_least_float32(residual.dtype)))
    kernels = add_norm_unsupported(update, residual) is None
    return _add_norm(kernels, float(norm_eps), update, residual, gain, keep)


def add_norm_unsupported(update: Any, residual: Any) -> str | None:
    """Return why no kernel computes `add_norm` of such arrays here, or None. Of arrays only the types matter.

    On GPUs other than Hopper's the kernels are compiled once to find out. If that fails, the reason is logged once.
    """
    missing = gpu.kernels_missing()
    if missing is not None:
        return missing
    from pallas_kernels.mixer_core import mosaic

    reason = mosaic.add_norm_unsupported(update, residual)
    if reason is not None:
        return reason
    reason = gpu.trial_failure("add_norm", _trial(update, residual))
    if reason is not None:
        gpu.log_once(f"add_norm: using XLA and not the GPU kernels, since {reason}")
    return reason


def _trial(update: Any, residual: Any) -> Trial:
    """Describe both kernels, of the sum and norm and of their gradient, for arrays of these types."""
    from pallas_kernels.mixer_core import mosaic

    def run(update, residual, gain, keep):
        # The second kernel is the first one's gradient, so neither is differentiated.
        update, residual, gain, keep = lax.stop_gradient((update, residual, gain, keep))
        total, normed = mosaic.add_norm(update, residual, gain, keep, norm_eps=1e-6)
        return mosaic.norm_gradient(total, normed, total, gain, keep, norm_eps=1e-6)

    like = jax.ShapeDtypeStruct
    gain = like(residual.shape[2:], jnp.float32)
    keep = like(residual.shape[:1], jnp.float32)
    return Trial(run, (update, residual, gain, keep), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _add_norm(kernels, eps, update, residual, gain, keep):
    from pallas_kernels.mixer_core import mosaic

    kernel: Callable = functools.partial(mosaic.add_norm, norm_eps=eps)
    other: Callable = functools.partial(xla.add_and_normalise_update, eps=eps)
    tokens = "b l o"
    operands = (tokens, tokens, "o", None if keep is None else "b")
    return _on_shares(kernels, kernel, other, operands, (update, residual, gain, keep))


def _forward(kernels, eps, update, residual, gain, keep):
    total, normed = _add_norm(kernels, eps, update, residual, gain, keep)
    return (total, normed), (total, gain, keep)


def _backward(kernels, eps, saved, bars):
    from pallas_kernels.mixer_core import mosaic

    total, gain, keep = saved
    total_bar, normed_bar = bars

    kernel: Callable = functools.partial(mosaic.norm_gradient, norm_eps=eps)
    other: Callable = functools.partial(xla.norm_gradient, eps=eps)
    tokens = "b l o"
    operands = (*[tokens] * 3, "o", None if keep is None else "b")
    arrays = total_bar, normed_bar, total, gain, keep
    residual_bar, update_bar = _on_shares(kernels, kernel, other, operands, arrays)
    normalise = lambda gain: xla.rms_norm(total, gain, eps, normed_bar.dtype)  # noqa: E731
    (gain_bar,) = jax.vjp(normalise, gain)[1](normed_bar)  # Dead code where the gain is constant.
    keep_bar = None if keep is None else jnp.zeros_like(keep)
    return update_bar, residual_bar, gain_bar, keep_bar


def _on_shares(kernels: bool, kernel: Callable, other: Callable, operands, arrays):
    """Run on each device's share of the batch: the kernel if the program is lowered for CUDA, otherwise the other."""

    def on_share(_, *arrays):
        return on_cuda(kernel, other, *arrays) if kernels else other(*arrays)

    return per_shard(on_share, operands, ("b l o", "b l o"), split="b", opaque=kernels)(*arrays)


_add_norm.defvjp(_forward, _backward)

"""Define `add_norm`: a residual sum and the norm behind it; and `norm_stream`: the norm before the first sum."""

from __future__ import annotations

import dataclasses
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
from pallas_kernels.sharding import match_types, on_cuda, per_shard
from pallas_kernels.trial import Trial


def add_norm(
    update: Float[Array, "b l o"],
    residual: Float[Array, "b l o"],
    gain: Float[Array, " o"],
    shift: Float[Array, " o"] | None = None,
    bias: Float[Array, " o"] | None = None,
    *,
    norm_eps: float = 1e-6,
    keep: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, "b l o"], Float[Array, "b l o"]]:
    """Add a block's output to the residual stream, and normalise the sum for the next block.

        residual = residual + keep · (update + bias)                rounded to the dtype of `residual`
        normed   = residual / sqrt(mean over o of residual² + norm_eps) · gain
        normed   = (residual - mean over o) / sqrt(variance over o + norm_eps) · gain + shift      with a shift

    `mixer_block` ends in the same way. One kernel computes both lines, and one their gradient, if the program is
    lowered for a Hopper or newer GPU and `add_norm_unsupported` returns None; otherwise XLA.

    Args:
        update: last product of a block or branch, in half precision.
        residual: residual stream. Its sum is computed in float32 or wider, and the norm reads the rounded sum.
        gain: scale of the norm.
        shift: shift of a LayerNorm; None for an RMSNorm.
        bias: bias of the product, added in float32 or wider; None for 0. It needs a shift.
        norm_eps: epsilon of the norm.
        keep: one factor for each image, as drop path draws them; no gradient flows to it. None for 1.

    Returns:
        The new residual stream, and its normalised tokens in the dtype of `update`.

    Raises:
        ValueError: an array is not of floats, its shape does not fit `update`, or there is a bias without a shift.
    """
    update = as_floats("add_norm", "update", update, "b l o")
    residual = as_floats("add_norm", "residual", residual, "b l o")
    beside = f"update {update.shape} (b l o)"
    expect_shape("add_norm", "residual", residual, "b l o", update.shape, beside)
    if shift is None and bias is not None:
        raise ValueError("add_norm: bias is for a LayerNorm only: give a shift, too.")
    vectors: dict[str, Any] = {"gain": gain, "shift": shift, "bias": bias}
    for name, vector in vectors.items():
        if vector is not None or name == "gain":
            vectors[name] = as_floats("add_norm", name, vector, "o")
            expect_shape("add_norm", name, vectors[name], "o", update.shape[2:], beside)
    if keep is not None:
        keep = as_floats("add_norm", "keep", keep, "b")
        expect_shape("add_norm", "keep", keep, "b", update.shape[:1], beside)
        keep = lax.stop_gradient(keep.astype(xla.at_least_float32(residual.dtype)))
    call = _Call.of(update, residual, vectors["shift"], norm_eps)
    return _add_norm(call, update, residual, *vectors.values(), keep)


def norm_stream(
    residual: Float[Array, "b l o"],
    gain: Float[Array, " o"],
    shift: Float[Array, " o"] | None = None,
    *,
    dtype: Any,
    norm_eps: float = 1e-6,
) -> tuple[Float[Array, "b l o"], Float[Array, "b l o"]]:
    """Normalise a residual stream to which nothing is added yet, as `add_norm` does for the first block.

    Args:
        residual, gain, shift, norm_eps: see `add_norm`.
        dtype: of the normalised tokens.

    Returns:
        The residual stream as it is, and its normalised tokens. Take both from here, so that one kernel computes the
        gradient of both.
    """
    residual = as_floats("norm_stream", "residual", residual, "b l o")
    vectors = [as_floats("norm_stream", "gain", gain, "o")]
    vectors.append(None if shift is None else as_floats("norm_stream", "shift", shift, "o"))
    for name, vector in zip(("gain", "shift"), vectors, strict=True):
        if vector is not None:
            beside = f"residual {residual.shape} (b l o)"
            expect_shape("norm_stream", name, vector, "o", residual.shape[2:], beside)
    call = _Call.of(jax.ShapeDtypeStruct(residual.shape, dtype), residual, shift, norm_eps)
    return _add_norm(call, None, residual, *vectors, None, None)


def add_norm_unsupported(update: Any, residual: Any, *, layer: bool = False) -> str | None:
    """Return why no kernel computes `add_norm` of such arrays here, or None. Of arrays only the types matter.

    On GPUs other than Hopper's the kernels are compiled once to find out. If that fails, the reason is logged once.

    Args:
        update, residual: as for `add_norm`.
        layer: whether the norm is a LayerNorm, which has a shift.
    """
    missing = gpu.kernels_missing()
    if missing is not None:
        return missing
    from pallas_kernels.mixer_core import mosaic

    reason = mosaic.add_norm_unsupported(update, residual)
    if reason is not None:
        return reason
    reason = gpu.trial_failure("add_norm", _trial(update, residual, layer))
    if reason is not None:
        gpu.log_once(f"add_norm: using XLA and not the GPU kernels, since {reason}")
    return reason


def _trial(update: Any, residual: Any, layer: bool) -> Trial:
    """Describe both kernels, of the sum and norm and of their gradient, for arrays of these types."""
    from pallas_kernels.mixer_core import mosaic

    gradient = mosaic.layer_norm_gradient if layer else mosaic.norm_gradient

    def run(update, residual, gain, keep):
        # The second kernel is the first one's gradient, so neither is differentiated.
        update, residual, gain, keep = lax.stop_gradient((update, residual, gain, keep))
        more = (gain, gain) if layer else (None, None)
        total, normed = mosaic.add_norm(update, residual, gain, *more, keep, norm_eps=1e-6)
        return gradient(total, normed, total, gain, keep, norm_eps=1e-6)

    like = jax.ShapeDtypeStruct
    gain = like(residual.shape[2:], jnp.float32)
    keep = like(residual.shape[:1], jnp.float32)
    return Trial(run, (update, residual, gain, keep), layer)


TOKENS = "b l o"


@dataclasses.dataclass(frozen=True)
class _Call:
    """Hold what is not an array: whether kernels run, the norm's epsilon, and the normalised tokens' dtype."""

    kernels: bool
    eps: float
    dtype: Any

    @classmethod
    def of(cls, update: Any, residual: Any, shift: Any, eps: float) -> _Call:
        """Decide for an update of this type."""
        reason = add_norm_unsupported(update, residual, layer=shift is not None)
        return cls(reason is None, float(eps), jnp.dtype(update.dtype))

    def on_shares(self, name: str, other_name: str, operands, results, arrays, **static: Any):
        """Run on each device's share of the batch: the kernel if the program is lowered for CUDA, otherwise XLA."""
        from pallas_kernels.mixer_core import mosaic

        kernel: Callable = functools.partial(getattr(mosaic, name), norm_eps=self.eps, **static)
        other: Callable = functools.partial(getattr(xla, other_name), eps=self.eps, **static)

        def on_share(_, *arrays):
            return on_cuda(kernel, other, *arrays) if self.kernels else other(*arrays)

        return per_shard(on_share, operands, results, split="b", opaque=self.kernels)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_norm(call: _Call, update, residual, gain, shift, bias, keep):
    vectors = (gain, shift, bias)
    operands = (_dims(TOKENS, update), TOKENS, *(_dims("o", x) for x in vectors), _dims("b", keep))
    arrays = (update, residual, *vectors, keep)
    names = ("add_norm", "add_and_normalise_update")
    return call.on_shares(*names, operands, (TOKENS, TOKENS), arrays, dtype=call.dtype)


def _forward(call, update, residual, gain, shift, bias, keep):
    total, normed = _add_norm(call, update, residual, gain, shift, bias, keep)
    return (total, normed), (total, gain, shift, bias, keep, update is None)


def _backward(call, saved, bars):
    total, gain, shift, bias, keep, alone = saved
    total_bar, normed_bar = bars
    arrays = total_bar, normed_bar, total, gain, keep
    operands = (*[TOKENS] * 3, "o", _dims("b", keep))
    if shift is None:
        names = ("norm_gradient",) * 2
        residual_bar, update_bar = call.on_shares(*names, operands, (TOKENS, TOKENS), arrays)
        normalise = lambda gain: xla.rms_norm(total, gain, call.eps, normed_bar.dtype)  # noqa: E731
        (gain_bar,) = jax.vjp(normalise, gain)[1](
            normed_bar
        )  # Dead code where the gain is constant.
        vector_bars = gain_bar, None, None
    else:
        names, results = ("layer_norm_gradient",) * 2, (TOKENS, TOKENS, "n o")
        residual_bar, update_bar, sums = call.on_shares(*names, operands, results, arrays)
        found = sums[0], sums[1], None if bias is None else sums[2]
        vector_bars = match_types(found, (gain, shift, bias))
    keep_bar = None if keep is None else jnp.zeros_like(keep)
    return None if alone else update_bar, residual_bar, *vector_bars, keep_bar


def _dims(letters: str, array: Any) -> str | None:
    return None if array is None else letters


_add_norm.defvjp(_forward, _backward)

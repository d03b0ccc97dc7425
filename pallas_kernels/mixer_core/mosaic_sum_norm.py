"""Add to the residual stream and apply the next norm as one Mosaic GPU kernel.

    r += keep · (update + bias)
    n = r / sqrt(mean(r²) + eps) · gain                              RMSNorm
    n = (r - mean(r)) / sqrt(variance(r) + eps) · gain + shift       LayerNorm, if there is a shift

r is float32 or bfloat16, and n is that of the rounded r. The kernel reads r and the update once, and writes r and n
once. A warp owns a token, and a lane owns neighbouring channels: four of each 128, or two of each 64 where 128 do not
divide a token. All loads of a warp's tokens are on their way at the same time. If the number of tokens is no
multiple of four, one thread block computes the last four once more, to the same numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import largest_divisor
from pallas_kernels.mixer_core.mosaic_back_project import COLUMNS, Layouts, mean, rounded, spread
from pallas_kernels.mixer_core.mosaic_common import BLOCK, whole_tokens_unsupported
from pallas_kernels.mosaic import WARPS, gpu_kernel, interpret_params, store

WIDEST = 1280  # channels of a token; more do not fit registers
TOGETHER = 768  # channels of the tokens of a warp, unless one token has more


def unsupported(tokens: int, width: int) -> str | None:
    """Return why the kernel does not take `tokens` tokens of `width` channels, or None."""
    return whole_tokens_unsupported(tokens, width, COLUMNS, WIDEST)


@functools.partial(jax.jit, static_argnames=("dtype", "eps", "interpret"))
def sum_norm(update, residual, gain, shift, bias, keep, *, dtype: str, eps: float, interpret: bool):
    """Add an update to the residual stream and normalise the sum.

    Args:
        update: ``b l d`` in half precision; or None, to normalise the residual stream as it is.
        residual: ``b l d`` float32 or bfloat16.
        gain: of the norm, ``d`` float32.
        shift: of a LayerNorm, ``d`` float32; or None for an RMSNorm.
        bias: of the update, ``d`` float32; or None.
        keep: factors of each image's update, ``b`` float32; or None.
        dtype: of the normalised tokens.
        eps: epsilon of the norm.
        interpret: run in Pallas' interpreter.

    Returns:
        The sum in the dtype of `residual`, which is `residual` itself without an update; and the normalised tokens.
    """
    shape, width = residual.shape, residual.shape[-1]
    unit = COLUMNS if width % BLOCK else BLOCK
    count, parts = residual.size // width, width // unit
    groups = count // WARPS
    steps = largest_divisor(groups, max(1, TOGETHER // width))  # tokens of a warp
    blocks = groups // steps
    layouts = Layouts()
    of_tokens, of_vector, of_numbers = (
        (layouts.outputs, layouts.of_columns, layouts.of_outputs)
        if unit == COLUMNS
        else (layouts.tokens, layouts.of_channels, layouts.of_tokens)
    )

    def body(*refs):
        inputs = iter(refs)
        update_ref, residual_ref, gain_ref, shift_ref, bias_ref, keep_ref = (
            None if x is None else next(inputs) for x in (update, residual, gain, shift, bias, keep)
        )
        *sum_refs, normed_ref = inputs
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
        over = lambda x, axis: spread(x, (WARPS, unit), axis, of_tokens)  # noqa: E731

        def tokens(ref, at):
            return [load(ref.at[at, c], of_tokens) for c in range(parts)]

        def vector(ref):
            return [over(load(ref.at[c], of_vector), 1) for c in range(parts)]

        def run(places):
            loaded = [
                [None if ref is None else tokens(ref, at) for ref in (residual_ref, update_ref)]
                for at in places
            ]
            gains = vector(gain_ref)
            shifts, biases = (None if ref is None else vector(ref) for ref in (shift_ref, bias_ref))
            for at, (old, updates) in zip(places, loaded, strict=True):
                new = [part.astype(jnp.float32) for part in old]
                if updates is not None:
                    updates = [x.astype(jnp.float32) for x in updates]
                    if biases is not None:
                        updates = [x + b for x, b in zip(updates, biases, strict=True)]
                    if keep_ref is not None:
                        factor = over(load(keep_ref.at[at], of_numbers), 0)
                        updates = [x * factor for x in updates]
                    new = [
                        rounded(r + x, residual.dtype) for r, x in zip(new, updates, strict=True)
                    ]
                for ref in sum_refs:
                    for c, part in enumerate(new):
                        store(ref.at[at, c], part.astype(residual.dtype))
                if shifts is not None:
                    middle = over(mean(new), 0)
                    new = [part - middle for part in new]
                scaling = over(lax.rsqrt(mean([part * part for part in new]) + eps), 0)
                for c, part in enumerate(new):
                    normed = part * scaling * gains[c]
                    normed = normed if shifts is None else normed + shifts[c]
                    store(normed_ref.at[at, c], normed.astype(dtype))

        # From the last tokens to the first: the product wrote its last rows last, so the L2 cache may still have them.
        block = blocks - 1 - lax.axis_index("block")
        run([pl.ds((block * steps + step) * WARPS, WARPS) for step in range(steps)])
        if count % WARPS:
            pl.when(block == blocks - 1)(lambda: run([pl.ds(count - WARPS, WARPS)]))

    flat = lambda x: x.reshape(-1, parts, unit)  # noqa: E731
    tokens_given = [flat(x) for x in (update, residual) if x is not None]
    vectors = [x.reshape(parts, unit) for x in (gain, shift, bias) if x is not None]
    dtypes = [dtype] if update is None else [residual.dtype, dtype]
    *total, normed = gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((count, parts, unit), kind) for kind in dtypes],
        interpret=interpret_params(interpret),
        kernel_name="mixer_sum_norm",
        grid=(blocks,),
        grid_names=("block",),
    )(
        *tokens_given, *vectors,
        *(() if keep is None else (jnp.repeat(keep, count // keep.size),)),
    )  # fmt: skip
    return total[0].reshape(shape) if total else residual, normed.reshape(shape)

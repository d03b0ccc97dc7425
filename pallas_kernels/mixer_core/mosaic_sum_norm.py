"""Add to the residual stream and apply the next RMSNorm as one Mosaic GPU kernel.

    r += keep · update,   n = r / sqrt(mean(r²) + eps) · gain

r is float32 or bfloat16, and n is that of the rounded r. The kernel reads r and the update once, and writes r and n
once. A warp owns a token, and a lane owns four neighbouring channels of each 128. All loads of a warp's tokens are on
their way at the same time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import largest_divisor
from pallas_kernels.mixer_core.mosaic_back_project import Layouts, mean, rounded, spread
from pallas_kernels.mixer_core.mosaic_common import BLOCK, blocked, whole_tokens_unsupported
from pallas_kernels.mosaic import WARPS, gpu_kernel, interpret_params, store

WIDEST = 1280  # channels of a token; more do not fit registers
TOGETHER = 768  # channels of the tokens of a warp, unless one token has more


def unsupported(tokens: int, width: int) -> str | None:
    """Return why the kernel does not take `tokens` tokens of `width` channels, or None."""
    return whole_tokens_unsupported(tokens, width, BLOCK, WIDEST)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def sum_norm(update, residual, gain, keep, *, eps: float, interpret: bool):
    """Add an update to the residual stream and normalise the sum.

    Args:
        update: ``b l d`` in half precision.
        residual: ``b l d`` float32 or bfloat16.
        gain: of the norm, ``d`` float32.
        keep: factors of each image's update, ``b`` float32; or None.
        eps: epsilon of the norm.
        interpret: run in Pallas' interpreter.

    Returns:
        The sum in the dtype of `residual`, and the normalised tokens in the dtype of `update`.
    """
    shape, width = residual.shape, residual.shape[-1]
    count, blocks = residual.size // width, width // BLOCK
    steps = largest_divisor(count // WARPS, max(1, TOGETHER // width))  # tokens of a warp
    layouts = Layouts()

    def body(update_ref, residual_ref, gain_ref, *refs):
        *keep_refs, sum_ref, normed_ref = refs
        # From the last tokens to the first: the product wrote its last rows last, so the L2 cache may still have them.
        block = count // (steps * WARPS) - 1 - lax.axis_index("block")
        first = block * (steps * WARPS)
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
        over = lambda x, axis: spread(x, (WARPS, BLOCK), axis, layouts.tokens)  # noqa: E731

        def tokens(ref, step):
            at = pl.ds(first + step * WARPS, WARPS)
            return [load(ref.at[at, c], layouts.tokens) for c in range(blocks)]

        loaded = [
            [tokens(ref, step) for ref in (residual_ref, update_ref)] for step in range(steps)
        ]
        gains = [over(load(gain_ref.at[c], layouts.of_channels), 1) for c in range(blocks)]
        for step, (old, updates) in enumerate(loaded):
            at = pl.ds(first + step * WARPS, WARPS)
            updates = [x.astype(jnp.float32) for x in updates]
            for ref in keep_refs:
                factor = over(load(ref.at[at], layouts.of_tokens), 0)
                updates = [x * factor for x in updates]
            new = [
                rounded(r.astype(jnp.float32) + x, residual.dtype)
                for r, x in zip(old, updates, strict=True)
            ]
            scaling = over(lax.rsqrt(mean([part * part for part in new]) + eps), 0)
            for c, part in enumerate(new):
                store(sum_ref.at[at, c], part.astype(residual.dtype))
                store(normed_ref.at[at, c], (part * scaling * gains[c]).astype(update.dtype))

    flat = lambda x: blocked(x.reshape(-1, width))  # noqa: E731
    total, normed = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((count, blocks, BLOCK), residual.dtype),
            jax.ShapeDtypeStruct((count, blocks, BLOCK), update.dtype),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_sum_norm",
        grid=(count // (steps * WARPS),),
        grid_names=("block",),
    )(
        flat(update), flat(residual), blocked(gain),
        *(() if keep is None else (jnp.repeat(keep, count // keep.size),)),
    )  # fmt: skip
    return total.reshape(shape), normed.reshape(shape)

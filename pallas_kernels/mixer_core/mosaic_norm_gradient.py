"""Compute the gradient of a residual sum and the RMSNorm behind it as one Mosaic GPU kernel.

    r = the residual stream,   n = r / sqrt(mean(r²) + eps) · gain
    r_bar += (g - r̂ mean(g r̂)) / sqrt(mean(r²) + eps),   g = n_bar · gain,   r̂ = n / gain

The kernel reads r_bar, n_bar and r once, and writes the sum twice: in the dtype of r_bar, for the residual stream, and
rounded, for the products of out_proj's gradients. Where both would be equal it writes it once. A warp owns a token. It
has all loads of its tokens on their way at the same time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import largest_divisor
from pallas_kernels.mixer_core.mosaic_back_project import COLUMNS, Layouts, mean, spread
from pallas_kernels.mixer_core.mosaic_common import whole_tokens_unsupported
from pallas_kernels.mosaic import WARPS, gpu_kernel, interpret_params, store

WIDEST = 768  # channels of a token; more do not fit registers
TOGETHER = 384  # channels of the tokens of a warp, unless one token has more


def unsupported(tokens: int, width: int) -> str | None:
    """Return why the kernel does not take `tokens` tokens of `width` channels, or None."""
    return whole_tokens_unsupported(tokens, width, COLUMNS, WIDEST)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def norm_gradient(residual_bar, normed_bar, residual, gain, keep, *, eps: float, interpret: bool):
    """Add the gradient of a residual stream through its RMSNorm to the gradient that it has otherwise.

    Args:
        residual_bar: gradient of the residual stream from elsewhere, ``b l d`` in the dtype of `residual`.
        normed_bar: gradient of the normalised tokens, ``b l d``.
        residual: ``b l d`` float32 or bfloat16.
        gain: of the norm, ``d`` float32.
        keep: factors of each image in the rounded sum, ``b`` float32; or None.
        eps: epsilon of the norm.
        interpret: run in Pallas' interpreter.

    Returns:
        The sum in the dtype of `residual`; and the sum times `keep`, rounded to the dtype of `normed_bar`.
    """
    shape, width = residual.shape, residual.shape[-1]
    count, columns = residual.size // width, width // COLUMNS
    steps = largest_divisor(count // WARPS, max(1, TOGETHER // width))  # tokens of a warp
    layouts = Layouts()
    once = keep is None and residual_bar.dtype == normed_bar.dtype

    def body(bar_ref, normed_ref, residual_ref, gain_ref, *refs):
        *keep_refs, sum_ref, rounded_ref = refs if not once else (*refs, None)
        first = lax.axis_index("block") * (steps * WARPS)
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
        over = lambda x, axis: spread(x, (WARPS, COLUMNS), axis, layouts.outputs)  # noqa: E731

        def tokens(ref, step):
            at = pl.ds(first + step * WARPS, WARPS)
            return [load(ref.at[at, c], layouts.outputs) for c in range(columns)]

        loaded = [
            [tokens(ref, step) for ref in (residual_ref, normed_ref, bar_ref)]
            for step in range(steps)
        ]
        gains = [over(load(gain_ref.at[c], layouts.of_columns), 1) for c in range(columns)]
        for step, (r, bars, sums) in enumerate(loaded):
            r = [part.astype(jnp.float32) for part in r]
            inverse = over(lax.rsqrt(mean([part * part for part in r]) + eps), 0)
            r = [part * inverse for part in r]
            g = [bar.astype(jnp.float32) * gain for bar, gain in zip(bars, gains, strict=True)]
            share = over(mean([a * b for a, b in zip(g, r, strict=True)]), 0)
            at = pl.ds(first + step * WARPS, WARPS)
            for c in range(columns):
                total = sums[c].astype(jnp.float32) + (g[c] - r[c] * share) * inverse
                store(sum_ref.at[at, c], total.astype(residual_bar.dtype))
                if once:
                    continue
                for ref in keep_refs:
                    total = total * over(load(ref.at[at], layouts.of_outputs), 0)
                store(rounded_ref.at[at, c], total.astype(normed_bar.dtype))

    by_columns = lambda x: x.reshape(-1, columns, COLUMNS)  # noqa: E731
    dtypes = (residual_bar.dtype, normed_bar.dtype)[: 1 if once else 2]
    results = gpu_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((count, columns, COLUMNS), dtype) for dtype in dtypes],
        interpret=interpret_params(interpret),
        kernel_name="mixer_norm_gradient",
        grid=(count // (steps * WARPS),),
        grid_names=("block",),
    )(
        *map(by_columns, (residual_bar, normed_bar, residual)),
        gain.reshape(columns, COLUMNS),
        *(() if keep is None else (jnp.repeat(keep, count // keep.size),)),
    )
    return results[0].reshape(shape), results[-1].reshape(shape)

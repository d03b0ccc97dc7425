"""Compute the gradient of a residual sum and the norm behind it as one Mosaic GPU kernel.

    r̂ = r / sqrt(mean(r²) + eps)                                   RMSNorm
    r̂ = (r - mean(r)) / sqrt(variance(r) + eps)                    LayerNorm
    r_bar += (g - r̂ mean(g r̂)) / sqrt(... + eps),   g = n_bar · gain;   a LayerNorm's g has its mean subtracted

The kernel reads r_bar, n_bar and r once, and writes the sum twice: in the dtype of r_bar, for the residual stream, and
rounded, for the products of the update's gradients. Where both would be equal it writes it once. A warp owns a token.
It has all loads of its tokens on their way at the same time.

For a LayerNorm a warp goes over several tokens and adds up what the gradients of gain, shift and the update's bias are
sums of: n_bar r̂, n_bar and the rounded sum. Each thread block writes its own three sums.
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
from pallas_kernels.mosaic import PROCESSORS, WARPS, gpu_kernel, interpret_params, store

WIDEST = 768  # channels of a token; more do not fit registers
TOGETHER = 384  # channels of the tokens of a warp, unless one token has more
SUMMING = 4 * PROCESSORS  # thread blocks that share the tokens if there are sums over them


def unsupported(tokens: int, width: int) -> str | None:
    """Return why the kernel does not take `tokens` tokens of `width` channels, or None."""
    return whole_tokens_unsupported(tokens, width, COLUMNS, WIDEST)


@functools.partial(jax.jit, static_argnames=("eps", "layer", "interpret"))
def norm_gradient(
    residual_bar,
    normed_bar,
    residual,
    gain,
    keep,
    *,
    eps: float,
    layer: bool = False,
    interpret: bool,
):
    """Add the gradient of a residual stream through its norm to the gradient that it has otherwise.

    Args:
        residual_bar: gradient of the residual stream from elsewhere, ``b l d`` in the dtype of `residual`.
        normed_bar: gradient of the normalised tokens, ``b l d``.
        residual: ``b l d`` float32 or bfloat16.
        gain: of the norm, ``d`` float32.
        keep: factors of each image in the rounded sum, ``b`` float32; or None.
        eps: epsilon of the norm.
        layer: whether the norm is a LayerNorm.
        interpret: run in Pallas' interpreter.

    Returns:
        The sum in the dtype of `residual`; the sum times `keep`, rounded to the dtype of `normed_bar`; and, for a
        LayerNorm, the gradients of gain, shift and bias, each as the sums of some tokens: ``n 3 d`` float32.
    """
    shape, width = residual.shape, residual.shape[-1]
    count, columns = residual.size // width, width // COLUMNS
    groups, rest = divmod(count, WARPS)
    steps = largest_divisor(groups, max(1, TOGETHER // width))  # tokens of a warp
    turns = groups // steps
    blocks = min(turns, SUMMING) if layer else turns
    layouts = Layouts()
    once = keep is None and residual_bar.dtype == normed_bar.dtype
    sums_of = range(3 if layer else 0)

    def body(bar_ref, normed_ref, residual_ref, gain_ref, *refs):
        given = list(refs)
        keep_ref = given.pop(0) if keep is not None else None
        new_ref = given.pop(0) if layer and rest else None
        sum_ref = given.pop(0)
        rounded_ref = None if once else given.pop(0)
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
        over = lambda x, axis: spread(x, (WARPS, COLUMNS), axis, layouts.outputs)  # noqa: E731
        over_channels = lambda parts: over(mean(parts), 0)  # noqa: E731

        def tokens(ref, at):
            return [load(ref.at[at, c], layouts.outputs) for c in range(columns)]

        def run(places, sums, gains, counted=None):
            """Compute the tokens at `places`, and return the sums with the tokens that are `counted`, or all."""
            loaded = [
                [tokens(ref, at) for ref in (residual_ref, normed_ref, bar_ref)] for at in places
            ]
            for at, (r, bars, others) in zip(places, loaded, strict=True):
                r = [part.astype(jnp.float32) for part in r]
                if layer:
                    middle = over_channels(r)
                    r = [part - middle for part in r]
                inverse = over(lax.rsqrt(mean([part * part for part in r]) + eps), 0)
                r = [part * inverse for part in r]
                bars = [bar.astype(jnp.float32) for bar in bars]
                g = [bar * gain for bar, gain in zip(bars, gains, strict=True)]
                share = over_channels([a * b for a, b in zip(g, r, strict=True)])
                middle = over_channels(g) if layer else None
                factor = (
                    None if keep_ref is None else over(load(keep_ref.at[at], layouts.of_outputs), 0)
                )
                for c in range(columns):
                    inner = g[c] - r[c] * share
                    inner = inner if middle is None else inner - middle
                    total = others[c].astype(jnp.float32) + inner * inverse
                    store(sum_ref.at[at, c], total.astype(residual_bar.dtype))
                    total = total if factor is None else total * factor
                    if rounded_ref is not None:
                        store(rounded_ref.at[at, c], total.astype(normed_bar.dtype))
                    terms = (bars[c] * r[c], bars[c], total)[: len(sums_of)]
                    for i, term in enumerate(terms):
                        term = term if counted is None else term * counted
                        sums = {**sums, (i, c): sums[i, c] + term}
            return sums

        block = lax.axis_index("block")
        gains = [over(load(gain_ref.at[c], layouts.of_columns), 1) for c in range(columns)]
        at_turn = lambda turn: [  # noqa: E731
            pl.ds((turn * steps + step) * WARPS, WARPS) for step in range(steps)
        ]
        last = [pl.ds(count - WARPS, WARPS)]  # some of them are of the last turn, too
        if not layer:
            run(at_turn(block), {}, gains)
            if rest:

                @pl.when(block == blocks - 1)
                def _():
                    run(last, {}, gains)

            return
        zero = plgpu.layout_cast(jnp.zeros((WARPS, COLUMNS), jnp.float32), layouts.outputs)
        zeros = {(i, c): zero for i in sums_of for c in range(columns)}
        partial_ref = given.pop(0)

        def write(slot, sums):
            for (i, c), value in sums.items():
                store(partial_ref.at[slot, i, c], jnp.sum(value, axis=0))

        mine = lax.div(turns - block + blocks - 1, blocks)
        turn_of = lambda k, sums: run(at_turn(block + k * blocks), sums, gains)  # noqa: E731
        write(block, lax.fori_loop(0, mine, turn_of, zeros))
        if rest:

            @pl.when(block == (turns - 1) % blocks)
            def _():
                counted = over(load(new_ref, layouts.of_outputs), 0)
                write(blocks, run(last, zeros, gains, counted))

    by_columns = lambda x: x.reshape(-1, columns, COLUMNS)  # noqa: E731
    like = jax.ShapeDtypeStruct
    dtypes = (residual_bar.dtype, normed_bar.dtype)[: 1 if once else 2]
    out_type = [like((count, columns, COLUMNS), dtype) for dtype in dtypes]
    slots = blocks + bool(rest)
    if layer:
        out_type.append(like((slots, len(sums_of), columns, COLUMNS), jnp.float32))
    more = [] if keep is None else [jnp.repeat(keep, count // keep.size)]
    if layer and rest:
        more.append((jnp.arange(WARPS) >= WARPS - rest).astype(jnp.float32))
    results = gpu_kernel(
        body,
        out_type=out_type,
        interpret=interpret_params(interpret),
        kernel_name="mixer_norm_gradient",
        grid=(blocks,),
        grid_names=("block",),
    )(
        *map(by_columns, (residual_bar, normed_bar, residual)),
        gain.reshape(columns, COLUMNS),
        *more,
    )
    total, rounded = results[0].reshape(shape), results[0 if once else 1].reshape(shape)
    if not layer:
        return total, rounded
    return total, rounded, results[-1].reshape(slots, len(sums_of), width)

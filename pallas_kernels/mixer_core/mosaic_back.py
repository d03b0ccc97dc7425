"""Compute the back of the mixer (repeat, add the skips, LayerNorm, gate) as a Mosaic GPU kernel.

    s   = (y_f + y_b of the token's line)/2 + skip,   skip = (D_f c_f + D_b c_b)/2,   c = silu(conv(x))
    out = LayerNorm(s) · silu(z)

A *line* is what the mixer pools: a row or a column of the grid. The front has computed the skips. A warp owns a token,
and a lane owns four neighbouring channels of each 128. It reads skip and z straight into registers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.mosaic_back_project import Layouts, spread
from pallas_kernels.mixer_core.mosaic_common import BLOCK, blocked, silu
from pallas_kernels.mixer_core.types import CoreOptions
from pallas_kernels.mosaic import WARPS, gpu_kernel, interpret_params, store, warp_index


def unsupported(tokens: int) -> str | None:
    """Return why `back` does not take images of so many tokens, or None. A device's share may be one image."""
    return f"{tokens} tokens are fewer than {WARPS}" if tokens < WARPS else None


@functools.partial(jax.jit, static_argnames=("options", "interpret"))
def back(z, skip, y, ids, scale, shift, options: CoreOptions, *, interpret: bool):
    """Repeat the scans' outputs over their lines, add the skips, apply the norm, and gate with silu(z).

    Args:
        z: ``b tokens e``, or ``b tokens 2e`` with z in the second half.
        skip: mean of both directions' skips, ``b tokens e`` in z's dtype.
        y: scan outputs, forward and backward, ``b steps e`` float32 each.
        ids: for a ragged grid, the index of each token's line in y: ``b tokens`` int32 for each direction. Else ().
        scale, shift: parameters of the norm, ``e`` float32.
        options: grid and norm.
        interpret: run in Pallas' interpreter.

    Returns:
        ``b tokens e`` in z's dtype.
    """
    (batch, length, width), dtype = skip.shape, skip.dtype
    count, blocks, real = batch * length, width // BLOCK, width - options.padding
    fours = count // WARPS
    z_block = (z.shape[2] - width) // BLOCK
    layouts = Layouts()

    def steps_of(ids_refs, token):
        """Return a token's image and the scans' steps that it takes its outputs from."""
        image, at = lax.div(token, length), lax.rem(token, length)
        if ids_refs:
            return image, [ref[image, at] for ref in ids_refs]
        per_row = options.columns * options.per_position
        row, at = lax.div(at, per_row), lax.rem(at, per_row)
        column, k = lax.div(at, options.per_position), lax.rem(at, options.per_position)
        line = column if options.transposed else row
        return image, [line * options.per_position + k] * 2

    def body(z_ref, skip_ref, *refs):
        *sides, scale_ref, shift_ref, out_ref = refs
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
        over = lambda x, axis: spread(x, (WARPS, BLOCK), axis, layouts.tokens)  # noqa: E731
        vector = lambda ref, c: over(load(ref.at[c], layouts.of_channels), 1)  # noqa: E731

        def warps_of(first):
            """Find image and steps of four tokens, of which each warp has one."""
            warps = (
                range(WARPS) if interpret else [warp_index()]
            )  # The interpreter runs all warps as one.
            return [steps_of(sides[2:], first + warp) for warp in warps]

        def of_tokens(found):
            """Load the mean of both scans' outputs for four tokens."""

            def rows(image, steps):
                pairs = (
                    [
                        load(ref.at[image, step, c], layouts.of_channels).astype(jnp.float32)
                        for c in range(blocks)
                    ]
                    for ref, step in zip(sides[:2], steps, strict=True)
                )
                return [
                    (forward + backward) * 0.5 for forward, backward in zip(*pairs, strict=True)
                ]

            if interpret:
                four = [rows(*of_warp) for of_warp in found]
                return [jnp.stack(parts) for parts in zip(*four, strict=True)]
            return [over(part, 1) for part in rows(*found[0])]

        def average(parts):
            return over(jnp.sum(functools.reduce(jnp.add, parts), axis=1) * (1.0 / real), 0)

        def deviations(s):
            mean = average(s)
            *s, last = [part - mean for part in s]
            if options.padding:
                channel = plgpu.broadcasted_iota(jnp.int32, last.shape, 1, layout=layouts.tokens)
                last = jnp.where(channel < BLOCK - options.padding, last, 0.0)
            return [*s, last]

        def centred(s):
            """Return the tokens less their mean if the norm subtracts it, and what the norm multiplies them by."""
            if options.norm_kind == "none":
                return s, None
            if options.norm_kind == "layer":
                s = deviations(s)
            return s, lax.rsqrt(average([part * part for part in s]) + options.eps)

        def tokens(ref, at, offset=0):
            return [load(ref.at[at, offset + c], layouts.tokens) for c in range(blocks)]

        def four_tokens(start):
            """Compute four tokens. All loads of skip and z are on their way at the same time."""
            at = pl.ds(start, WARPS)
            found = warps_of(
                start
            )  # First, because the loads of y wait for a ragged grid's row ids.
            skips, gates = tokens(skip_ref, at), tokens(z_ref, at, z_block)
            s = [
                part + more.astype(jnp.float32)
                for part, more in zip(of_tokens(found), skips, strict=True)
            ]
            s, inverse = centred(s)
            for c, (part, gate) in enumerate(zip(s, gates, strict=True)):
                if inverse is not None:
                    part = part * inverse * vector(scale_ref, c) + vector(shift_ref, c)
                gate = silu(gate.astype(jnp.float32), layouts.tokens, interpret, dtype)
                store(out_ref.at[at, c], (part * gate).astype(dtype))

        # From the last tokens to the first: the front wrote the last skips last, so the L2 cache may still have them.
        # And out_proj begins with the first tokens.
        block = fours - 1 - lax.axis_index("block")
        four_tokens(block * WARPS)
        rest = count % WARPS
        if rest:  # Some of these tokens have been written already, by this thread block.
            last = block * WARPS + rest
            pl.when(block == fours - 1)(lambda: four_tokens(last))

    flat = lambda x: blocked(x.reshape(count, -1))  # noqa: E731
    out = gpu_kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, blocks, BLOCK), dtype),
        interpret=interpret_params(interpret),
        kernel_name="mixer_back",
        grid=(fours,),
        grid_names=("block",),
    )(flat(z), flat(skip), *map(blocked, y), *ids, blocked(scale), blocked(shift))
    return out.reshape(skip.shape)

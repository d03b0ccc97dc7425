"""Compute the back of the mixer (repeat, add the skips, LayerNorm, gate), and its gradients, as Mosaic GPU kernels.

    s   = (y_f + y_b of the token's line)/2 + skip,   skip = (D_f c_f + D_b c_b)/2,   c = silu(conv(x))
    out = LayerNorm(s) · silu(z)

A *line* is what the mixer pools: a row or a column of the grid. The front has computed the skips. In `back` a warp owns
a token, and a lane owns four neighbouring channels of each 128. It reads skip and z straight into registers.

`back_gradients` computes the skips again. It cuts lines into *segments* of tokens (`Grid`), and works on each in two
phases. First each thread owns some channels and walks the tokens: it computes the convolutions and s, and keeps s in
shared memory. Then each warp owns a token. `mosaic_segments` says how several warpgroups work on one segment.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import Grid
from pallas_kernels.mixer_core.mosaic_back_project import Layouts, spread
from pallas_kernels.mixer_core.mosaic_common import BLOCK, blocked, logistic, read_row, silu
from pallas_kernels.mixer_core.mosaic_segments import Segments
from pallas_kernels.mixer_core.types import CoreOptions, Norm
from pallas_kernels.mosaic import WARPS, gpu_kernel, interpret_params, store, warp_index


def summed(parts: jax.Array, norm: Norm, norm_kind: str) -> Norm:
    """Add up the parts of the gradients of a norm's parameters, which are zero if there is no norm."""
    if norm_kind == "none":
        return jax.tree.map(jnp.zeros_like, norm)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), Norm(*parts.sum(1)), norm)


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

        def of_tokens(first):
            """Load the mean of both scans' outputs for four tokens, of which each warp has one."""

            def rows(token):
                image, steps = steps_of(sides[2:], token)
                pairs = (
                    [load(ref.at[image, step, c], layouts.of_channels) for c in range(blocks)]
                    for ref, step in zip(sides[:2], steps, strict=True)
                )
                return [
                    (forward + backward) * 0.5 for forward, backward in zip(*pairs, strict=True)
                ]

            if interpret:  # It runs all warps as one.
                four = [rows(first + warp) for warp in range(WARPS)]
                return [jnp.stack(parts) for parts in zip(*four, strict=True)]
            return [over(part, 1) for part in rows(first + warp_index())]

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
            skips, gates = tokens(skip_ref, at), tokens(z_ref, at, z_block)
            s = [
                part + more.astype(jnp.float32)
                for part, more in zip(of_tokens(start), skips, strict=True)
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


@functools.partial(jax.jit, static_argnames=("grid", "eps", "interpret"))
def back_gradients(
    xz, y, ids, kernels, biases, D, scale, shift, out_bar, grid: Grid, *, eps, interpret
):
    """Compute the gradients of `back` through gate, LayerNorm and repeat.

    `mosaic_front_gradients` continues from here, through skip and convolutions.

    Args:
        xz: ``b rows (columns per_position) 2e``, x then z.
        y: scan outputs, forward and backward, ``b steps e`` float32 each.
        ids: for a ragged grid, the index of each token's line in y: ``b tokens`` int32 for each direction. ``grid`` is
            then any grid that holds the tokens. For a whole grid, ().
        kernels: of the convolutions, ``2 k e`` float32.
        biases, D: ``2 e`` float32.
        scale, shift: parameters of the LayerNorm, ``e`` float32.
        out_bar: gradient of `back`'s output, ``b rows (columns per_position) e`` in xz's dtype.
        grid: how the tokens are cut.
        eps: epsilon of the LayerNorm.
        interpret: run in Pallas' interpreter.

    Returns:
        ds: gradient of s, ``b rows (columns per_position) e`` in xz's dtype.
        dxz: gradient of xz, ``b rows (columns per_position) 2e``. Only its second half, the gradient of z, is written.
        dy: half the sum of ds over the tokens of each step of ``grid``, ``b steps e`` float32. For a whole grid this is
            the gradient of y; for a ragged grid it is not used.
        norm: gradients of scale and shift, summed per warp or thread block only, ``2 parts e`` float32.
    """
    work = Segments(grid, interpret)
    layouts = work.layouts
    exchange = work.exchange()
    scratch = 6 + len(exchange)

    def body(*refs):
        refs, tiles = refs[:-scratch], refs[-scratch:]
        xz_ref, *sides, k_ref, b_ref, D_ref, scale_ref, shift_ref, g_ref = refs[:-4]
        ds_ref, dxz_ref, dy_ref, norm_ref = refs[-4:]
        x_tile, z_tile, g_tile, s_tile, x_barrier, z_barrier = work.mine(*tiles[:6])
        batch, group = lax.axis_index("batch"), lax.axis_index("group")
        work.fetch_with_halo(xz_ref, x_tile, x_barrier, jnp.int32(0))

        def fetch_rest(item):
            work.fetch(xz_ref, z_tile, z_barrier, item, 1)
            work.fetch(g_ref, g_tile, z_barrier, item)

        fetch_rest(jnp.int32(0))
        parameters = lambda channels: work.parameters(k_ref, b_ref, D_ref, channels)  # noqa: E731
        norm = lambda: (work.vector(scale_ref), work.vector(shift_ref))  # noqa: E731
        if work.whole:
            held, held_norm = parameters(pl.ds(0, work.owned)), norm()
            parameters, norm = (lambda channels: held), (lambda: held_norm)

        def item_of(item, sums):
            line, part, _ = grid.place(group, item)
            plgpu.barrier_wait(x_barrier)
            work.mix(x_tile, sides[:2], sides[2:], item, s_tile, parameters)
            plgpu.commit_smem()

            @pl.when(item + 1 < work.items)
            def _():
                work.fetch_with_halo(xz_ref, x_tile, x_barrier, item + 1)

            plgpu.barrier_wait(z_barrier)

            def gated(rows):
                z, g = work.tokens(z_tile.at[rows]), work.tokens(g_tile.at[rows])
                sigma = logistic(z, layouts.tokens, interpret, xz.dtype)
                return z, g, sigma, g * z * sigma

            def sums_of(rows):
                slope = gated(rows)[-1] * layouts.over_tokens(norm()[0])
                return layouts.sums(work.tokens(s_tile.at[rows]), slope)

            of_segment = work.share(tiles[6:], item, sums_of)

            def finish(rows, sums):
                of_rows = of_segment(rows)
                s, inverse = layouts.normalise(work.tokens(s_tile.at[rows]), eps, of_rows)
                gamma, beta = (layouts.over_tokens(v) for v in norm())
                z, g, sigma, slope = gated(rows)
                dz = (
                    g
                    * layouts.scale_and_shift(s, gamma, beta)
                    * (sigma + z * sigma * (1.0 - sigma))
                )
                g = slope
                if work.padded != grid.segment:  # Rows past the segment hold arbitrary values.
                    row = lax.broadcasted_iota(jnp.int32, g.shape, 0)
                    row = plgpu.layout_cast(row, layouts.tokens) + rows.start
                    dz = jnp.where(row < grid.segment, dz, 0.0)
                    g = jnp.where(row < grid.segment, g, 0.0)
                    s = jnp.where(row < grid.segment, s, 0.0)
                counted = g
                if grid.overlaps:
                    row = lax.broadcasted_iota(jnp.int32, g.shape, 0)
                    row = plgpu.layout_cast(row, layouts.tokens) + rows.start
                    counted = jnp.where(grid.counts(part, row), g, 0.0)
                sums = (sums[0] + counted * s, sums[1] + counted)
                ds = layouts.normalise_gradient(g, s, gamma, inverse, of_rows)
                store(s_tile.at[rows], ds)
                store(g_tile.at[rows], ds.astype(xz.dtype))
                store(z_tile.at[rows], dz.astype(xz.dtype))
                return sums

            sums = work.each_token(finish, sums)
            plgpu.commit_smem()
            work.send(g_tile, ds_ref, item)
            work.send(z_tile, dxz_ref, item, 1)

            def add_up(channels):
                at = work.some(channels)
                for k in range(grid.per_position):
                    total = None
                    for t in range(k, grid.segment, grid.per_position):
                        of_token = read_row(s_tile.at[t, channels], work.row)
                        if grid.overlaps:
                            of_token = jnp.where(grid.counts(part, t), of_token, 0.0)
                        total = of_token if total is None else total + of_token
                    total = total * 0.5
                    ref = dy_ref.at[batch, line, k, at]
                    if grid.segments > 1:  # The same thread wrote what it reads.
                        total = total + jnp.where(part == 0, 0.0, read_row(ref, work.row))
                    store(ref, total)

            work.each_group(add_up)
            plgpu.wait_smem_to_gmem(0, wait_read_only=not grid.overlaps)
            plgpu.commit_smem()

            @pl.when(item + 1 < work.items)
            def _():
                fetch_rest(item + 1)

            return sums

        zeros = jnp.zeros((layouts.at_once, work.blocks, BLOCK), jnp.float32)
        zeros = plgpu.layout_cast(zeros, layouts.tokens)
        sums = lax.fori_loop(0, work.items, item_of, (zeros, zeros))
        for i in (0, 1):
            store(norm_ref.at[i, batch, group, :, work.channels()], sums[i])
        plgpu.wait_smem_to_gmem(0)

    streamed = lambda blocks: jax.ShapeDtypeStruct((*xz.shape[:3], blocks, BLOCK), xz.dtype)  # noqa: E731
    float32 = lambda *shape: jax.ShapeDtypeStruct((*shape, work.all_blocks, BLOCK), jnp.float32)  # noqa: E731
    ds, dxz, dy, norm = gpu_kernel(
        body,
        out_type=[
            streamed(work.all_blocks),
            streamed(2 * work.all_blocks),
            float32(grid.batch, grid.lines, grid.per_position),
            float32(2, grid.batch, grid.groups, layouts.at_once),
        ],
        scratch_types=[
            work.halo_tile(xz.dtype),
            work.tile(xz.dtype),
            work.tile(xz.dtype),
            work.tile(jnp.float32),
            work.barrier(grid.copies),
            work.barrier(2 * len(grid.pieces)),
            *exchange,
        ],
        interpret=interpret_params(interpret, work.groups),
        kernel_name="mixer_back_gradients",
        grid=(grid.groups, grid.batch),
        grid_names=("group", "batch"),
        **work.threads,
    )(*map(blocked, (xz, *y)), *ids, *map(blocked, (kernels, biases, D, scale, shift, out_bar)))
    dy = dy.reshape(grid.batch, grid.steps, grid.width)
    ds = ds.reshape(*ds.shape[:3], grid.width)
    return ds, dxz.reshape(xz.shape), dy, norm.reshape(2, -1, grid.width)

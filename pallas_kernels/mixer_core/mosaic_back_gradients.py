"""Compute the gradients of `mosaic_back` through gate, norm and repeat as one Mosaic GPU kernel.

    s = (y_f + y_b of the token's line)/2 + skip,   n = norm(s),   g = (n · scale + shift) · silu(z)

    ds = gradient of the norm for g_bar · silu(z) · scale,   dz = g_bar · (n · scale + shift) · silu'(z)
    dy = sum of ds/2 over the tokens that share a scan step

`mosaic_front_gradients` continues from ds, through skip and convolutions. A warp walks over the tokens of one scan
step, or over some of them, and a lane owns four neighbouring channels of each 128. So nothing passes between warps, and
all loads of a token go straight into registers. Sums over the tokens are in shared memory, since more warps then fit a
processor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.mosaic_back_project import Layouts, spread
from pallas_kernels.mixer_core.mosaic_common import BLOCK, blocked, logistic
from pallas_kernels.mixer_core.types import CoreOptions
from pallas_kernels.mosaic import (
    PROCESSORS,
    SHARED_MEMORY,
    WARPS,
    gpu_kernel,
    interpret_params,
    store,
    warp_index,
)

HELD = 3  # blocks of 128 channels of which a warp holds z and g_bar in registers; of more it reads them again
WIDE = 9  # blocks of channels from which on two thread blocks fit a processor, whether a warp reads ahead or not
WAVES = 3  # thread blocks of a processor that lines are cut for, if there are few
SHORTEST = 4  # tokens of a walk, at least, if the line has as many


@dataclasses.dataclass(frozen=True)
class Walk:
    """Say which tokens the warps visit: each has `length` of the tokens of a step, which `parts` warps share."""

    batch: int
    options: CoreOptions
    parts: int
    length: int

    @classmethod
    def choose(cls, batch: int, options: CoreOptions) -> Walk:
        """Cut lines only where they are too few to fill the device."""
        positions, steps = options.positions, batch * options.steps
        wanted = pl.cdiv(WAVES * PROCESSORS * WARPS, steps)
        length = max(pl.cdiv(positions, wanted), min(SHORTEST, positions))
        return cls(batch, options, pl.cdiv(positions, length), length)

    @property
    def count(self) -> int:
        return self.batch * self.options.steps * self.parts

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.count, WARPS)

    @property
    def exact(self) -> bool:
        """Whether every warp has a walk and every walk has `length` tokens. Otherwise tokens are visited again."""
        divides = self.parts * self.length == self.options.positions
        return divides and self.count % WARPS == 0

    def place(self, walk):
        """Return the image of a walk, its step, its part of the step, and whether no walk before it is the same."""
        new, walk = walk < self.count, lax.min(walk, self.count - 1)
        per_image = self.options.steps * self.parts
        image, rest = lax.div(walk, per_image), lax.rem(walk, per_image)
        return image, lax.div(rest, self.parts), lax.rem(rest, self.parts), new

    def token(self, place, t):
        """Return the index of the walk's token number t in the image, and whether the walk is so long."""
        _, step, part, _ = place
        options = self.options
        at = part * self.length + t
        inside, at = at < options.positions, lax.min(at, options.positions - 1)
        line, k = lax.div(step, options.per_position), lax.rem(step, options.per_position)
        row, column = (at, line) if options.transposed else (line, at)
        return (row * options.columns + column) * options.per_position + k, inside


def _tiles(width: int, ragged: bool) -> tuple[int, ...]:
    """Return the shape of the shared memory: for each warp, sums over tokens and, of a whole grid, its step's y."""
    return 2 if ragged else 4, WARPS, width // BLOCK, BLOCK


def unsupported(width: int) -> str | None:
    """Return why `back_gradients` does not take tokens of `width` channels, or None."""
    size = 4 * math.prod(_tiles(width, False))
    return f"{width} channels do not fit shared memory" if size > SHARED_MEMORY - 1024 else None


@functools.partial(jax.jit, static_argnames=("options", "with_g", "interpret"))
def back_gradients(
    xz,
    skip,
    y,
    ids,
    scale,
    shift,
    out_bar,
    options: CoreOptions,
    *,
    with_g: bool,
    interpret: bool,
) -> tuple[Any, ...]:
    """Compute the gradients of `mosaic_back.back`, and its result once more if asked for.

    Args:
        xz: ``b tokens 2e`` with z in the second half; the first half is not read.
        skip: mean of both directions' skips, ``b tokens e`` in xz's dtype.
        y: scan outputs, forward and backward, ``b steps e`` float32 each.
        ids: for a ragged grid, the index of each token's line in y: ``b tokens`` int32 for each direction. ``options``
            are then those of any grid that holds the tokens. For a whole grid, ().
        scale, shift: parameters of the norm, ``e`` float32.
        out_bar: gradient of `back`'s result, ``b tokens e`` in xz's dtype.
        options: grid and norm.
        with_g: return `back`'s result as well.
        interpret: run in Pallas' interpreter.

    Returns:
        ds: gradient of s, ``b tokens e`` in xz's dtype.
        dxz: gradient of xz, ``b tokens 2e``. Only its second half, the gradient of z, is written.
        dy: half the sum of ds over the tokens of each step, ``b steps e`` float32: the gradient of y; None for a ragged
            grid.
        norm: gradients of scale and shift, summed per thread block only, ``2 parts e`` float32.
        g: `back`'s result, ``b tokens e`` in xz's dtype, or None.
    """
    (batch, length, width), dtype = skip.shape, skip.dtype
    count, blocks, real = batch * length, width // BLOCK, width - options.padding
    walk = Walk.choose(batch, options)
    kind, layouts = options.norm_kind, Layouts()
    sums = range(2 if ids else 3)  # of g_bar silu n, of g_bar silu, and of ds
    # The compiler lets no read pass a write. So a block of channels is read before the one ahead of it is written,
    # where that costs no thread block of a processor.
    ahead = blocks >= WIDE
    warps = range(WARPS)

    def body(*given):
        xz_ref, skip_ref, bar_ref, *refs = given
        sides, refs = refs[:2], refs[2:]
        ids_refs, refs = refs[: len(ids)], refs[len(ids) :]
        scale_ref, shift_ref, ds_ref, dxz_ref, norm_ref, *refs = refs
        tile = refs.pop()
        dy_ref = None if ids else refs.pop(0)
        g_ref = refs.pop(0) if with_g else None
        over = lambda x, axis: spread(x, (WARPS, BLOCK), axis, layouts.tokens)  # noqa: E731
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731
        vector = lambda ref, c: over(load(ref.at[c], layouts.of_channels), 1)  # noqa: E731
        first = lax.axis_index("block") * WARPS
        # The interpreter runs all warps as one: their walks stand in a list. On the device each warp knows its own.
        mine = [0] if not interpret else warps
        warp = None if interpret else warp_index()
        places = [walk.place(first + (w if interpret else warp)) for w in mine]

        def rows(ref, indices, c):
            """Load a row for each warp: the one that a slice of four rows has at the warp's own place."""
            if interpret:
                return jnp.stack([ref[i, c] for i in indices])
            return load(ref.at[pl.ds(indices[0] - warp, WARPS), c], layouts.tokens)

        def write(ref, indices, c, value):
            if interpret:
                for w, i in enumerate(indices):
                    ref[i, c] = value[w]
            else:
                store(ref.at[pl.ds(indices[0] - warp, WARPS), c], value)

        def of_tile(i, c):
            return load(tile.at[i, :, c], layouts.tokens)

        def of_warps(values):
            return jnp.stack(values)[:, None] if interpret else values[0]

        def average(parts):
            return over(jnp.sum(functools.reduce(jnp.add, parts), axis=1) * (1.0 / real), 0)

        def real_channels(parts):
            if not options.padding:
                return parts
            *parts, last = parts
            channel = plgpu.broadcasted_iota(jnp.int32, last.shape, 1, layout=layouts.tokens)
            return [*parts, jnp.where(channel < BLOCK - options.padding, last, 0.0)]

        def y_of(steps):
            pairs = [
                [rows(ref, at, c) for c in range(blocks)]
                for ref, at in zip(sides, steps, strict=True)
            ]
            return [(a + b) * 0.5 for a, b in zip(*pairs, strict=True)]

        def steps_of(t):
            """Return the rows of both scans' outputs that the walks' tokens number t take."""
            if not ids:
                at = [image * options.steps + step for image, step, *_ in places]
                return at, at
            return [
                [
                    place[0] * y[0].shape[1] + ref[place[0], walk.token(place, t)[0]]
                    for place in places
                ]
                for ref in ids_refs
            ]

        def visit(t, _):
            visited = [walk.token(place, t) for place in places]
            at = [
                image * length + token
                for (image, *_), (token, _) in zip(places, visited, strict=True)
            ]
            skips, z, bar = (
                [rows(ref, at, offset + c) for c in range(blocks)]
                for ref, offset in ((skip_ref, 0), (xz_ref, blocks), (bar_ref, 0))
            )
            of_y = y_of(steps_of(t)) if ids else [of_tile(len(sums), c) for c in range(blocks)]
            s = [a.astype(jnp.float32) + b for a, b in zip(skips, of_y, strict=True)]
            if kind != "none":
                if kind == "layer":
                    mean = average(s)
                    s = real_channels([part - mean for part in s])
                scaled = [
                    gated(*parts)[-1] * vector(scale_ref, c)
                    for c, parts in enumerate(zip(z, bar, strict=True))
                ]
                inverse = lax.rsqrt(average([part * part for part in s]) + options.eps)
                share = average([a * b for a, b in zip(scaled, s, strict=True)]) * inverse
                middle = average(scaled) if kind == "layer" else 0.0
            inside = [inside for _, inside in visited]
            new = [jnp.logical_and(a, new) for a, (*_, new) in zip(inside, places, strict=True)]
            counted = [None] * 3 if walk.exact else [of_warps(new)] * 2 + [of_warps(inside)]

            def read(c):
                """Read what channel block c needs besides the token: gate and gradient, norm and, if ahead, sums."""
                gate, of_out = z[c], bar[c]
                if blocks > HELD:
                    gate, of_out = rows(xz_ref, at, blocks + c), rows(bar_ref, at, c)
                gamma = beta = None
                if kind != "none":
                    gamma, beta = vector(scale_ref, c), vector(shift_ref, c)
                return gate, of_out, gamma, beta, [of_tile(i, c) for i in sums] if ahead else []

            following = read(0)
            for c in range(blocks):
                gate, of_out, gamma, beta, totals = following
                if ahead and c + 1 < blocks:
                    following = read(c + 1)
                of_out, sigma, silu, slope = gated(gate, of_out)
                n, shifted, ds = s[c], s[c], slope
                if kind != "none":
                    n = n * inverse
                    shifted = n * gamma + beta
                    ds = (slope * gamma - middle - n * share) * inverse
                    if c == blocks - 1:
                        (ds,) = real_channels([ds])
                dz = of_out * shifted * (sigma + silu * (1.0 - sigma))
                write(ds_ref, at, c, ds.astype(dtype))
                write(dxz_ref, at, blocks + c, dz.astype(dtype))
                if g_ref is not None:
                    write(g_ref, at, c, (shifted * silu).astype(dtype))
                for i, add in zip(sums, (slope * n, slope, ds), strict=False):
                    if not walk.exact:
                        add = jnp.where(counted[i], add, 0.0)
                    total = totals[i] if ahead else of_tile(i, c)
                    store(tile.at[i, :, c], total + add)
                if not ahead and c + 1 < blocks:
                    following = read(c + 1)

        def gated(z, bar):
            """Return g's gradient, the logistic function and SiLU of z, and the shifted norm's gradient."""
            z, bar = z.astype(jnp.float32), bar.astype(jnp.float32)
            sigma = logistic(z, layouts.tokens, interpret, dtype)
            return bar, sigma, z * sigma, bar * (z * sigma)

        zero = plgpu.layout_cast(jnp.zeros((WARPS, BLOCK), jnp.float32), layouts.tokens)
        of_step = [] if ids else y_of(steps_of(0))
        for c in range(blocks):
            for i, value in enumerate([*[zero] * len(sums), *of_step[c : c + 1]]):
                store(tile.at[i, :, c], value)
        lax.fori_loop(0, walk.length, visit, None)
        if dy_ref is not None:
            at = [(part * batch + image) * options.steps + step for image, step, part, _ in places]
            for c in range(blocks):
                write(dy_ref, at, c, of_tile(2, c) * 0.5)
        # Add up the warps' sums for the norm's parameters.
        plgpu.commit_smem()
        layout = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)
        for i in (0, 1):
            for c in range(blocks):
                row = [plgpu.load(tile.at[i, w, c], layout=layout) for w in warps]
                store(norm_ref.at[i, lax.axis_index("block"), c], functools.reduce(jnp.add, row))

    flat = lambda x: blocked(x.reshape(count, -1))  # noqa: E731
    float32 = lambda *shape: jax.ShapeDtypeStruct((*shape, blocks, BLOCK), jnp.float32)  # noqa: E731
    tokens = lambda many: jax.ShapeDtypeStruct((count, many, BLOCK), dtype)  # noqa: E731
    ds, dxz, norm, *rest = gpu_kernel(
        body,
        out_type=[
            tokens(blocks),
            tokens(2 * blocks),
            float32(2, walk.blocks),
            *([] if ids else [float32(walk.parts * batch * options.steps)]),
            *([tokens(blocks)] if with_g else []),
        ],
        scratch_types=[plgpu.SMEM(_tiles(width, bool(ids)), jnp.float32)],
        interpret=interpret_params(interpret),
        kernel_name="mixer_back_gradients",
        grid=(walk.blocks,),
        grid_names=("block",),
    )(
        *map(flat, (xz, skip, out_bar)),
        *(blocked(side.reshape(-1, width)) for side in y),
        *ids,
        blocked(scale),
        blocked(shift),
    )
    dy = None if ids else rest.pop(0).reshape(walk.parts, batch, options.steps, width).sum(0)
    g = rest.pop().reshape(skip.shape) if with_g else None
    return ds.reshape(skip.shape), dxz.reshape(xz.shape), dy, norm.reshape(2, -1, width), g

"""Gradients of the weights of x_proj and dt_proj as one Mosaic GPU kernel for Hopper.

    W_x_bar = u^T c_bar;    W_Δ_bar = p^T Δ_bar          (p: the columns for Δ)

The sums go over all tokens of a direction. A thread block adds up some tokens for 64 channels of one of the two
products, with operands rounded to bfloat16. Nothing is accumulated by atomics: each thread block writes its own share.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import LANES, WARPS, gpu_kernel, interpret_params, narrowed, store, tiled
from pallas_kernels.selective_scan.mosaic_projected import Layouts, exchanged

CHANNELS = 64  # of a thread block, the rows of a wgmma instruction
TOKENS = 64  # whose operands are in one tile
MOST_TILES = 4  # of a thread block


def tiles(tokens: int) -> int:
    """Return how many tiles of tokens a thread block adds up."""
    count = tokens // TOKENS
    return max(d for d in range(1, MOST_TILES + 1) if count % d == 0)


_, SIXTEEN = tiled(((8 * WARPS, 16), (8, 16), (1, 4)), (-6,), (-4, -3), -1)
"""Register layout of rows of 16 numbers, four of them a lane."""


@functools.partial(jax.jit, static_argnames=("rank", "interpret"))
def weight_gradients(u, columns_bar, delta_bar, columns, *, rank: int, interpret: bool):
    """Compute shares of both gradients.

    Args:
        u: the tokens, ``2 t e`` float32.
        columns_bar: gradient of x_proj's columns, ``2 t c`` float32.
        delta_bar: of Δ before bias and softplus, ``2 t e`` float32.
        columns: x_proj's columns, ``2 t c`` float32; the first `rank` give Δ.
        rank: a multiple of 16.
        interpret: run in Pallas' interpreter.

    Returns:
        ``shares 2 e c`` and ``shares 2 rank e`` float32, to be added up.
    """
    _, tokens, width = u.shape
    all_columns, count = columns_bar.shape[-1], tiles(tokens)
    shares = tokens // (TOKENS * count)

    def body(u_ref, columns_bar_ref, delta_ref, columns_ref, project_ref, step_ref, *scratch):
        channel_tile, column_tile = scratch
        direction, share = lax.axis_index("direction"), lax.axis_index("share")
        first = lax.axis_index("channels") * CHANNELS
        here = pl.ds(first, CHANNELS)
        load = lambda ref: plgpu.load(ref, layout=SIXTEEN, optimized=False)  # noqa: E731

        def product(rows_ref, columns_ref, size):
            def operands(k):
                at = pl.ds((share * count + k) * TOKENS, TOKENS)

                def sixteens(ref, start, size):
                    starts = range(0, size, 16)
                    return [load(ref.at[direction, at, pl.ds(start + j, 16)]) for j in starts]

                return sixteens(rows_ref, first, CHANNELS), sixteens(columns_ref, 0, size)

            def keep(k, *operands):
                for tile, parts in zip(scratch, operands, strict=True):
                    for j, part in enumerate(parts):
                        part = narrowed(part, jnp.bfloat16, SIXTEEN, interpret)
                        store(tile.at[k, :, pl.ds(16 * j, 16)], part)

            def add_up(accumulator):
                loaded = operands(0)
                for k in range(count):
                    after = operands(k + 1) if k + 1 < count else None
                    keep(k, *loaded)
                    plgpu.commit_smem()
                    plgpu.wgmma(
                        accumulator,
                        channel_tile.at[k].transpose((1, 0)),
                        column_tile.at[k, :, pl.ds(0, size)],
                    )
                    loaded = after
                plgpu.wgmma_wait(0)
                return accumulator[...]

            return pl.run_scoped(add_up, plgpu.ACC((CHANNELS, size), jnp.float32))

        @pl.when(lax.axis_index("product") == 0)
        def _():
            total = product(u_ref, columns_bar_ref, all_columns)
            store(project_ref.at[share, direction, here], total)

        @pl.when(lax.axis_index("product") == 1)
        def _():
            total = product(delta_ref, columns_ref, rank)
            total = exchanged(total, (rank, CHANNELS), Layouts(LANES, 4).steps, interpret)
            store(step_ref.at[share, direction, :, here], total)

    transforms: Any = plgpu  # mypy takes them for abstract classes
    narrow = (transforms.TilingTransform((8, 16)), transforms.SwizzleTransform(32))
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return gpu_kernel(
        body,
        out_type=[float32(shares, 2, width, all_columns), float32(shares, 2, rank, width)],
        scratch_types=[
            plgpu.SMEM((count, TOKENS, CHANNELS), jnp.bfloat16, transforms=narrow),
            plgpu.SMEM((count, TOKENS, all_columns), jnp.bfloat16, transforms=narrow),
        ],
        interpret=interpret_params(interpret),
        kernel_name="projection_weight_gradients",
        grid=(width // CHANNELS, shares, 2, 2),
        grid_names=("channels", "share", "direction", "product"),
    )(u, columns_bar, delta_bar, columns)

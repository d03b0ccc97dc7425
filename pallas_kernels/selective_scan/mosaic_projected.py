"""Both scans of a mixer's pooled tokens with their projections to Δ, B and C, as one Mosaic GPU kernel for Hopper.

    [p, B, C] = u W_x;   Δ = softplus(p W_Δ + bias);   y = scan(u, Δ, A, B, C)

A thread block scans some channels of one direction of a few images. It

1. multiplies W_x with the tokens, all channels of them, part by part. The tokens are the columns of this product: there
   are fewer of them than the 64 rows that one instruction takes;
2. for 128 channels at a time, multiplies W_Δ with p and writes the step sizes to shared memory;
3. walks over the steps of these channels, image by image. A lane owns a channel with all its states.

One warpgroup does 1; all share 2 and 3. The products are in TF32 with rounded operands; step sizes and states are
float32. Of bfloat16 tokens, the first product is in bfloat16, and the second is two of them: of p rounded, and of what
the rounding left. Δ, B and C never exist in global memory, unless a gradient will read them (`keep`): then the thread
block also writes the columns of 1, B and C once more by themselves, and Δ before bias and softplus.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu
from pallas_kernels.mosaic import (
    LANES,
    WARPS,
    gpu_kernel,
    interpret_params,
    reduced,
    store,
    tf32,
    tiled,
)
from pallas_kernels.selective_scan.mosaic_common import StateLayouts, softplus
from pallas_kernels.selective_scan.mosaic_projected_cut import (
    CHANNELS,
    STATES,
    TALL,
    Cut,
    choose_cut,
)
from pallas_kernels.selective_scan.mosaic_walk import StepReader, in_turns

MOST_CHANNELS = 768  # of float32; of 1,536, the separate kernels are faster: each block loads half a megabyte of W_x
KEPT_ROWS = 8  # steps that a warpgroup writes at once of what a gradient reads


def unsupported(u: Any, rank: int, states: int) -> str | None:
    """Return why the kernel cannot take this call, or None. Of u `2 b l e` only shape and dtype matter."""
    if u.dtype not in (jnp.float32, jnp.bfloat16):
        return f"u is {u.dtype}, not float32 or bfloat16"
    narrow = u.dtype == jnp.bfloat16
    if not all(isinstance(size, int) for size in u.shape):
        return f"u {u.shape} has a symbolic size"
    if u.size == 0:
        return f"u {u.shape} is empty"
    if states != STATES:
        return f"it has {states} states, not {STATES}"
    _, batch, lines, width = u.shape
    if width % CHANNELS:
        return f"{width} channels are not made of whole blocks of {CHANNELS}"
    most = 2 * MOST_CHANNELS if narrow else MOST_CHANNELS
    if width > most:
        return f"{width} channels are more than {most}"
    if choose_cut(batch, lines, width, rank, narrow) is None:
        return f"{lines} steps of {width} channels do not fit shared memory"
    return None


def forward(u: jax.Array, weights: Any, y_dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """See `projected.projected_scan`."""
    first, second = _run(u, weights, keep=False, y_dtype=jnp.dtype(y_dtype))
    return first, second


def forward_keeping(u: jax.Array, weights: Any) -> tuple[jax.Array, ...]:
    """Return y of both directions and what a gradient reads; see `projected.xla_keeping`."""
    *outputs, columns, bc = _run(u, weights, keep=True, y_dtype=jnp.dtype("float32"))
    return *outputs, columns.reshape(*columns.shape[:3], -1), bc


def _run(u: jax.Array, weights: Any, *, keep: bool, y_dtype: jnp.dtype) -> list[jax.Array]:
    _, batch, lines, width = u.shape
    narrow = u.dtype == jnp.bfloat16
    if narrow:
        project, step = (w.astype(u.dtype) for w in weights[:2])
        weights = weights._replace(project=project, step=step)
    cut = choose_cut(batch, lines, width, weights.step.shape[-1], narrow)
    assert cut is not None, "unsupported"
    options = {"keep": keep, "y_dtype": y_dtype, "interpret": gpu.interpreted()}
    return gpu.run_once(projected_scan(u, *weights, cut, **options))


class Layouts:
    """Register layouts: products with their rows and columns exchanged, and tiles that become operands."""

    def __init__(self, part: int, owned: int):
        """Of a part of tokens, of `part` channels, a lane has `owned` neighbours."""
        # A product holds column 8 a + 2 (lane % 4) + i of row 16 warp + 8 r + lane / 4, in the order a, r, i.
        tiles: Any = ((8, TALL), (8, 16), (8, 8), (2, 1), (1, 1))
        base, self.steps = tiled(tiles, (-9,), (-5, -6), -1)
        self.bias = reduced(base, (0,))
        tiles = ((8, 4, 16), (8, 1, 16), (8, 1, 8), (2, 1, 1), (1, 1, 1))
        _, self.columns = tiled(tiles, (-14,), (-7, -9), -1)
        _, self.rank = tiled(((8, 16), (2, 16), (1, 1)), (-6,), (-4, -3), -1)
        lanes = part // owned  # of a row
        rows = LANES // lanes
        _, self.part = tiled(
            ((WARPS * rows, part), (rows, part), (1, owned)),
            (-6,),
            (-4, -3) if rows > 1 else (-3,),
            -1,
        )


def exchanged(product: jax.Array, shape: tuple[int, ...], layout: Any, interpret: bool):
    """Return a product's transpose as `shape` (columns first, then its rows) without moving anything."""
    if interpret:
        return product.T.reshape(shape)
    return plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(shape, product.dtype, layout=layout),
    )(functools.partial(_exchanged, shape=shape, layout=layout.to_mgpu()))(product)


def _exchanged(ctx: Any, product: mgpu.FragmentedArray, shape, layout) -> mgpu.FragmentedArray:
    del ctx
    rows, columns = product.shape
    registers = product.to_layout(fragmented_array.WGMMA_LAYOUT_ACC_32BIT).registers
    registers = registers.reshape(rows // TALL, columns // 8, 4).transpose(1, 0, 2)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)),
        _layout=layout,
        _is_signed=None,
    )


@functools.partial(jax.jit, static_argnames=("cut", "keep", "y_dtype", "interpret"))
def projected_scan(
    u, project, step, bias, A, cut: Cut, *, keep: bool, y_dtype: jnp.dtype, interpret: bool
):
    """Project the pooled tokens and scan them in both directions.

    Args:
        u: pooled tokens, ``2 b lines e`` float32.
        project: W_x transposed, ``2 (rank + 32) e`` float32, rounded to TF32.
        step: W_Δ transposed, ``2 e rank`` float32, rounded to TF32.
        bias: ``2 e`` float32.
        A: ``2 e 16`` float32.
        cut: how the work is cut.
        keep: also return what a gradient reads; for `KEPT_ROWS` lines and more.
        y_dtype: float32 or bfloat16.
        interpret: run in Pallas' interpreter.

    Returns:
        y of the first and of the second direction, ``b lines e`` each. With `keep`, also Δ before bias and
        softplus ``2 b lines e``, the columns of the first product ``2 b lines c 16``, and B and C ``2 2 b lines 16``.
    """
    layouts, states = Layouts(cut.part, 4), StateLayouts(1, STATES)
    images, rows, tokens, part = cut.images, cut.rows, cut.tokens, cut.part
    reader = StepReader(cut.plan, states, interpret)
    load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)  # noqa: E731

    def body(*refs):
        u_ref, project_ref, step_ref, bias_ref, a_ref, *y_refs = refs[:7]
        kept_refs, tiles = refs[7 : 7 + 3 * keep], refs[7 + 3 * keep :]
        u_tile, columns_tile, p_tile, step_tile, union, *barriers = tiles
        (part_tile, tokens_tile), (sizes_tile,) = union
        u_barrier, part_barrier, step_barrier, ready = barriers
        group, direction = lax.axis_index("warpgroup"), lax.axis_index("direction")
        first = lax.axis_index("images") * images
        first_block = lax.axis_index("split") * cut.blocks

        def fetch_tokens(piece):
            # A start that is no constant, because constant slices must end inside the array. The copy engine writes
            # zeros for steps and images that do not exist.
            steps = pl.ds(direction * 0, rows)
            at = (direction, pl.ds(first, images), steps, pl.ds(piece * CHANNELS, CHANNELS))
            plgpu.copy_gmem_to_smem(u_ref.at[at], u_tile.at[piece], u_barrier.at[piece])

        def fetch_part(k):
            slot = lax.rem(k, cut.slots)
            plgpu.copy_gmem_to_smem(
                project_ref.at[direction, :, pl.ds(k * part, part)],
                part_tile.at[slot, pl.ds(0, cut.columns)],
                part_barrier.at[slot],
            )

        def channels_of(k):
            """Return the channels of this warpgroup's block number k, and the number of that block."""
            block = first_block + group + k * cut.warpgroups
            return pl.ds(block * CHANNELS, CHANNELS), block

        def fetch_step(k):
            @pl.when(group + k * cut.warpgroups < cut.blocks)
            def _():
                plgpu.copy_gmem_to_smem(
                    step_ref.at[direction, channels_of(k)[0]],
                    step_tile.at[group],
                    step_barrier.at[group],
                )

        def project_tokens(accumulator):
            """Write p, B and C of all tokens to shared memory."""

            def multiply(k, _):
                slot, buffer = lax.rem(k, cut.slots), lax.rem(k, 2)
                piece, start = lax.div(k * part, CHANNELS), lax.rem(k * part, CHANNELS)

                @pl.when(start == 0)
                def _():
                    plgpu.barrier_wait(u_barrier.at[piece])

                for i in range(images):
                    x = load(u_tile.at[piece, i, :, pl.ds(start, part)], layouts.part)
                    x = x if cut.narrow else tf32(x, layouts.part, interpret)
                    store(tokens_tile.at[buffer, pl.ds(i * rows, rows)], x)
                plgpu.barrier_wait(part_barrier.at[slot])
                plgpu.commit_smem()
                operand = tokens_tile.at[buffer].transpose((1, 0))
                plgpu.wgmma(accumulator, part_tile.at[slot], operand)
                plgpu.wgmma_wait(1)
                plgpu.commit_smem()  # No warp reads the operands of the product before this one any more.

                @pl.when(jnp.logical_and(k > 0, k - 1 + cut.slots < cut.parts))
                def _():
                    fetch_part(k - 1 + cut.slots)

            lax.fori_loop(0, cut.parts, multiply, None)
            plgpu.wgmma_wait(0)
            shape = (tokens, cut.tall // STATES, STATES)
            store(columns_tile, exchanged(accumulator[...], shape, layouts.columns, interpret))
            plgpu.commit_smem()
            for j in range(cut.rank // STATES):
                p, at = load(columns_tile.at[:, j], layouts.rank), pl.ds(j * STATES, STATES)
                if cut.narrow:
                    high = p.astype(jnp.bfloat16)
                    store(p_tile.at[0, :, at], high)
                    store(p_tile.at[1, :, at], (p - high.astype(jnp.float32)).astype(jnp.bfloat16))
                else:
                    store(p_tile.at[0, :, at], tf32(p, layouts.rank, interpret))
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)

        @pl.when(group == 0)
        def _():
            for k in range(min(cut.slots, cut.parts)):
                if k * part % CHANNELS == 0:
                    fetch_tokens(k * part // CHANNELS)
                fetch_part(k)
            for piece in range(
                pl.cdiv(min(cut.slots, cut.parts) * part, CHANNELS), cut.width // CHANNELS
            ):
                fetch_tokens(piece)

        fetch_step(0)

        @pl.when(group == 0)
        def _():
            pl.run_scoped(project_tokens, plgpu.ACC((cut.tall, tokens), jnp.float32))

        plgpu.barrier_wait(ready)

        def keep_columns(image):
            """Write an image's columns of the first product to global memory, and B and C once more by themselves."""
            _, columns_ref, bc_ref = kept_refs
            b = cut.rank // STATES
            starts = range(0, cut.lines - KEPT_ROWS, KEPT_ROWS)
            for start in (*starts, cut.lines - KEPT_ROWS):  # The last two may overlap.
                at, to = pl.ds(image * rows + start, KEPT_ROWS), pl.ds(start, KEPT_ROWS)
                for j in range(cut.columns // STATES):
                    values = load(columns_tile.at[at, j], layouts.rank)
                    store(columns_ref.at[direction, first + image, to, j], values)
                    if j >= b:
                        store(bc_ref.at[j - b, direction, first + image, to], values)

        if keep:
            for image in range(images):
                mine = jnp.logical_and(group == image % cut.warpgroups, first + image < cut.batch)
                mine = jnp.logical_and(mine, lax.axis_index("split") == 0)
                pl.when(mine)(functools.partial(keep_columns, image))

        def walk(plan, image, here, block, decays):
            """Scan a block of channels of an image and write y."""
            y_ref = y_refs[int(plan.reverse)]
            bc = cut.rank // STATES
            bias_lane = reader.channel(bias_ref.at[direction, here]) if keep else None

            def turn(steps, carry):
                (state,) = carry
                shares, raws = [], []
                for t in steps:
                    row = image * rows + t
                    b = reader.coefficients(columns_tile.at[row, pl.ds(bc, 1)])
                    c = reader.coefficients(columns_tile.at[row, pl.ds(bc + 1, 1)])
                    size = reader.channel(sizes_tile.at[group, row, pl.ds(0, CHANNELS)])
                    if keep:
                        raws.append((t, size))
                        size = softplus(size + bias_lane, states.channel, interpret)
                    x = reader.channel(u_tile.at[block, image, t]).astype(jnp.float32)
                    factor = lax.exp2(reader.over_state(size) * decays)
                    state = factor * state + reader.over_state(x * size) * b
                    shares.append((t, jnp.sum(state * c, axis=2)))
                # Write all results after all reads, because the compiler does not move a read before a write.
                for t, share in shares:
                    store(y_ref.at[first + image, pl.ds(t, 1), here], share.astype(y_dtype))
                for t, raw in raws:
                    store(kept_refs[0].at[direction, first + image, t, here], raw)
                return (state,)

            in_turns(plan, turn, (reader.zeros(),))

        def write_sizes(k, here):
            """Write the step sizes of block number k to shared memory, or Δ before bias and softplus if it is kept."""
            plgpu.barrier_wait(step_barrier.at[group])

            def multiply(accumulator):
                for term in range(2 if cut.narrow else 1):
                    operand = p_tile.at[term].transpose((1, 0))
                    plgpu.wgmma(accumulator, step_tile.at[group], operand)
                plgpu.wgmma_wait(0)
                return accumulator[...]

            raw = pl.run_scoped(multiply, plgpu.ACC((CHANNELS, tokens), jnp.float32))
            plgpu.commit_smem()  # No warp reads this part of W any more.
            fetch_step(k + 1)
            raw = exchanged(raw, (tokens, CHANNELS), layouts.steps, interpret)
            if keep:
                store(sizes_tile.at[group, :, pl.ds(0, CHANNELS)], raw)
                return
            bias_vector = load(bias_ref.at[direction, here], layouts.bias)
            bias_tile = lax.broadcast_in_dim(bias_vector, (tokens, CHANNELS), (1,))
            raw = raw + plgpu.layout_cast(bias_tile, layouts.steps)
            sizes = softplus(raw, layouts.steps, interpret)
            store(sizes_tile.at[group, :, pl.ds(0, CHANNELS)], sizes)

        def scan_block(k, _):
            here, block = channels_of(k)
            decays = reader.decays(a_ref.at[direction, here])
            write_sizes(k, here)
            plgpu.commit_smem()
            for backward in (False, True):
                plan = dataclasses.replace(cut.plan, reverse=backward)

                @pl.when(direction == int(backward))
                def _(plan=plan):
                    for image in range(images):
                        run = functools.partial(walk, plan, image, here, block, decays)
                        pl.when(first + image < cut.batch)(run)

            plgpu.commit_smem()  # All warps have read the step sizes.

        mine = lax.div(cut.blocks - group + cut.warpgroups - 1, cut.warpgroups)
        lax.fori_loop(0, mine, scan_block, None)

    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    sequences, columns = (2, *u.shape[1:3]), cut.columns // STATES
    y = jax.ShapeDtypeStruct(u.shape[1:], y_dtype)
    kept = [
        float32(*u.shape),
        float32(*sequences, columns, STATES),
        float32(2, *sequences, STATES),
    ]
    return gpu_kernel(
        body,
        out_type=[y, y, *kept] if keep else [y, y],
        scratch_types=cut.scratch(),
        interpret=interpret_params(interpret, cut.warpgroups),
        kernel_name="projected_scan",
        grid=(cut.splits, cut.groups, 2),
        grid_names=("split", "images", "direction"),
        num_threads=cut.warpgroups,
        thread_name="warpgroup",
    )(u, project, step, bias, A.reshape(*A.shape[:2], 1, STATES))

"""Gradients of pooled tokens through the projections to Δ, B and C, as one Mosaic GPU kernel for Hopper.

    c_bar = [Δ_bar W_Δ^T, B_bar, C_bar];   u_bar = u_bar of the scan + c_bar W_x^T

A thread block has 64 tokens of one direction and some of the channels of u_bar. It

1. multiplies Δ_bar with W_Δ, all channels, part by part;
2. adds up the shares of B_bar and C_bar that the thread blocks of the scan's gradients have written;
3. multiplies the columns of 1 and 2 with W_x and adds what the scan gave u.

The products are in TF32. Columns are rounded to nearest; weights and Δ_bar are truncated by the tensor cores.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import SHARED_MEMORY, gpu_kernel, interpret_params, store, tf32
from pallas_kernels.selective_scan.mosaic_projected_cut import OVERHEAD, STATES

ROWS = 64  # of a thread block, and of a wgmma instruction
CHANNELS = 96  # of u_bar that a warpgroup computes
PART = 64  # channels of Δ_bar that arrive together
MOST_WARPGROUPS = 4


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the work is cut into thread blocks: static numbers that shape the kernel.

    Attributes:
        tokens: Tokens of a direction.
        width: Channels.
        rank: Columns for Δ, a multiple of 16.
        shares: Number of shares of B_bar and C_bar.
        warpgroups: Warpgroups of a thread block.
        slots: Parts of Δ_bar and W_Δ on their way.
    """

    tokens: int
    width: int
    rank: int
    shares: int
    warpgroups: int
    slots: int

    @property
    def columns(self) -> int:
        return self.rank + 2 * STATES

    @property
    def parts(self) -> int:
        return self.width // PART

    @property
    def splits(self) -> int:
        """Thread blocks that share the channels of u_bar. Each computes all columns."""
        return self.width // (CHANNELS * self.warpgroups)

    @property
    def shared_memory(self) -> int:
        """Bytes of a thread block's tiles."""
        arriving = self.slots * PART * (ROWS + self.rank)
        own = self.warpgroups * CHANNELS
        return 4 * (max(arriving, own * ROWS) + own * self.columns + ROWS * self.columns)

    def scratch(self) -> list[Any]:
        """Return the shared memory and the barriers of a thread block."""
        transforms: Any = plgpu  # mypy takes them for abstract classes
        wide = (transforms.TilingTransform((8, 32)), transforms.SwizzleTransform(128))
        narrow = (transforms.TilingTransform((8, 16)), transforms.SwizzleTransform(64))
        f32, own = jnp.float32, self.warpgroups
        return [
            plgpu.RefUnion(
                [
                    plgpu.SMEM((self.slots, ROWS, PART), f32, transforms=wide),
                    plgpu.SMEM((self.slots, self.rank, PART), f32, transforms=wide),
                ],
                [plgpu.SMEM((own, ROWS, CHANNELS), f32, transforms=wide)],
            ),
            plgpu.SMEM((own, CHANNELS, self.columns), f32, transforms=narrow),
            plgpu.SMEM((ROWS, self.columns), f32, transforms=narrow),
            plgpu.Barrier(num_arrivals=2, num_barriers=self.slots),  # parts
            plgpu.Barrier(num_arrivals=1, num_barriers=own),  # W_x
            plgpu.Barrier(num_arrivals=1, num_barriers=own),  # u_bar
            plgpu.Barrier(num_arrivals=own),  # columns
        ]


def choose_cut(tokens: int, width: int, rank: int, shares: int) -> Cut | None:
    """Choose the largest thread blocks that leave few processors idle; None if the kernel cannot run."""
    if tokens % ROWS or width % (CHANNELS * 2):
        return None
    for warpgroups in (4, 2) if width >= 768 else (2,):
        for slots in (4, 3, 2):
            cut = Cut(tokens, width, rank, shares, warpgroups, slots)
            fits = cut.shared_memory + OVERHEAD <= SHARED_MEMORY
            if width % (CHANNELS * warpgroups) == 0 and fits:
                return cut
    return None


@functools.partial(jax.jit, static_argnames=("cut", "interpret"))
def projection_gradients(delta_bar, bc_bar, u_bar, step, project, cut: Cut, *, interpret: bool):
    """Compute the gradients of tokens and of x_proj's columns.

    Args:
        delta_bar: of Δ before bias and softplus, ``2 t e`` float32.
        bc_bar: shares of the gradients of B and C, ``shares 2t 2 16`` float32.
        u_bar: what the scan gave the tokens, ``2 t e`` float32.
        step: W_Δ, ``2 r e`` float32; rows behind `rank` are not read.
        project: W_x, ``2 e columns`` float32.
        cut: how the work is cut.
        interpret: run in Pallas' interpreter.

    Returns:
        Gradients of the tokens ``2 t e``, and of the columns ``2 t columns``, rounded to TF32.
    """
    load = lambda ref: plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)  # noqa: E731
    own = cut.warpgroups

    def body(delta_ref, bc_ref, u_ref, step_ref, project_ref, out_ref, columns_ref, *tiles):
        union, project_tile, columns_tile, *barriers = tiles
        (delta_tile, step_tile), (u_tile,) = union
        part_barrier, project_barrier, u_barrier, ready = barriers
        group, direction = lax.axis_index("warpgroup"), lax.axis_index("direction")
        tokens = pl.ds(lax.axis_index("tokens") * ROWS, ROWS)
        here = pl.ds((lax.axis_index("split") * own + group) * CHANNELS, CHANNELS)

        def fetch_part(k):
            slot, part = lax.rem(k, cut.slots), pl.ds(k * PART, PART)
            barrier = part_barrier.at[slot]
            plgpu.copy_gmem_to_smem(
                delta_ref.at[direction, tokens, part], delta_tile.at[slot], barrier
            )
            plgpu.copy_gmem_to_smem(
                step_ref.at[direction, pl.ds(0, cut.rank), part], step_tile.at[slot], barrier
            )

        plgpu.copy_gmem_to_smem(
            project_ref.at[direction, here], project_tile.at[group], project_barrier.at[group]
        )

        def multiply_steps(accumulator):
            def multiply(k, _):
                slot = lax.rem(k, cut.slots)
                plgpu.barrier_wait(part_barrier.at[slot])
                plgpu.wgmma(accumulator, delta_tile.at[slot], step_tile.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(1)
                plgpu.commit_smem()  # No warp reads the operands of the product before this one any more.

                @pl.when(jnp.logical_and(k > 0, k - 1 + cut.slots < cut.parts))
                def _():
                    fetch_part(k - 1 + cut.slots)

            lax.fori_loop(0, cut.parts, multiply, None)
            plgpu.wgmma_wait(0)
            return accumulator[...]

        def keep(columns, start):
            rounded = tf32(columns, plgpu.Layout.WGMMA, interpret)
            store(columns_tile.at[:, pl.ds(start, columns.shape[1])], rounded)

        @pl.when(group == 0)
        def _():
            for k in range(min(cut.slots, cut.parts)):
                fetch_part(k)
            accumulator = plgpu.ACC((ROWS, cut.rank), jnp.float32)
            keep(pl.run_scoped(multiply_steps, accumulator), 0)

        rows = pl.ds(direction * cut.tokens + lax.axis_index("tokens") * ROWS, ROWS)
        for k in range(2):

            @pl.when(group == (1 + k) % own)
            def _(k=k):
                shares = [load(bc_ref.at[j, rows, k]) for j in range(cut.shares)]
                keep(functools.reduce(jnp.add, shares), cut.rank + k * STATES)

        plgpu.commit_smem()
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
        plgpu.copy_gmem_to_smem(
            u_ref.at[direction, tokens, here], u_tile.at[group], u_barrier.at[group]
        )

        @pl.when(jnp.logical_and(lax.axis_index("split") == 0, group == 0))
        def _():
            plgpu.copy_smem_to_gmem(columns_tile, columns_ref.at[direction, tokens])

        def multiply_columns(accumulator):
            plgpu.barrier_wait(project_barrier.at[group])
            plgpu.wgmma(accumulator, columns_tile, project_tile.at[group].transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return accumulator[...]

        product = pl.run_scoped(multiply_columns, plgpu.ACC((ROWS, CHANNELS), jnp.float32))
        plgpu.barrier_wait(u_barrier.at[group])
        store(u_tile.at[group], product + load(u_tile.at[group]))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(u_tile.at[group], out_ref.at[direction, tokens, here])
        plgpu.wait_smem_to_gmem(0)

    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return gpu_kernel(
        body,
        out_type=[float32(*u_bar.shape), float32(2, cut.tokens, cut.columns)],
        scratch_types=cut.scratch(),
        interpret=interpret_params(interpret, own),
        kernel_name="projection_gradients",
        grid=(cut.splits, cut.tokens // ROWS, 2),
        grid_names=("split", "tokens", "direction"),
        num_threads=own,
        thread_name="warpgroup",
    )(delta_bar, bc_bar, u_bar, step, project)

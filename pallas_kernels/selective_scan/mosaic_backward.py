"""Backward selective scan as a Mosaic GPU kernel (Hopper and newer).

The blocks are those of the forward kernel, visiting the chunks from last to first, or
several sequences of one chunk one after another.
For a chunk, the states are recomputed from the one that entered it and kept in
registers; then the recurrence of the gradients runs back over its steps:

    G_t  = C_t dy_t + c_t            c_t: what flows back from step t + 1
    dB_t = sum over channels of G_t step_t u_t       dC_t likewise of dy_t h_t
    S1_t = sum over n of G_t B_t                     S2_t likewise of A a_t h_{t-1} G_t
    du   = step S1 + D dy       dstep = u S1 + S2    dA += step_t a_t h_{t-1} G_t
    c_{t-1} = a_t G_t

Nothing is accumulated by atomics: each block writes its own share of dB, dC, dA, dD and
d(bias), and the caller adds the shares, so that the gradients are the same every time.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import compiler_params, gpu_kernel, interpret_params, sigmoid, store
from pallas_kernels.selective_scan.mosaic_common import StateLayouts, lane_sums, tile_layout
from pallas_kernels.selective_scan.mosaic_walk import (
    Plan,
    StepReader,
    Stream,
    along_channels,
    by_direction,
    channel_vectors,
    entering_state,
    input_tiles,
    prepare_tile,
    raw_steps,
    tile_rows,
)


def _ahead(plan: Plan) -> tuple[int, int]:
    """Choose the steps whose sums over channels are exchanged together, and those whose factors wait in registers.

    Other factors are computed again. Every exchange waits for the one before it; the more steps share an exchange, the
    more work hides the wait. Registers limit both numbers: a thread has 168 if three blocks share a processor. With 64
    channels and enough blocks, or with both directions, a thread needs more than that in any case; then two blocks per
    processor are faster, and there is room for all factors.
    """
    if plan.rest > 4:
        return 1, 0
    if plan.channels == 32:
        return 2, 4 if plan.tf32_sums else 0  # Sums on the tensor cores leave registers.
    return (1, 1) if plan.splits > 1 and plan.directions == 1 else (4, plan.chunk)


class _BackwardStream(Stream):
    """The chunks of a split from last to first."""

    def chunk(self, k):
        return super().chunk(self.plan.per_split - 1 - k)


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def scan_gradients(
    u, delta, B, C, A, D, bias, states, y_bar, leaving, last_state_bar, plan, *, interpret
):
    """Compute the gradients of `mosaic_forward.scan` without its gate, of one or both directions.

    Args:
        states: the state entering every chunk, ``b k e w r``; None if there is one chunk.
        y_bar: gradients of y, ``b l e``, one for each direction.
        leaving: what ``split_ends`` of the way back returned, when ``plan.splits > 1``.
        last_state_bar: gradient of the last state ``b e w r``, or None.

    Returns:
        A dict: u, delta ``b l e`` in their dtypes; "bc" ``blocks b l 2 w r``, dB and dC, of
        whole chunks if there are several, and A ``p s e w r``, D and bias ``p s e``: float32 shares still to be added
        up.
    """
    layouts = StateLayouts(plan.warps, plan.rest)
    sources = {"x": u, "delta": delta, "g": y_bar[0], "b": B, "c": C}
    if states is not None:
        sources["h"] = states
    names = list(sources)
    extras = {"D": D, "bias": bias, "last": last_state_bar}
    extras = {name: value for name, value in extras.items() if value is not None}
    if plan.splits > 1:
        extras |= {"ends": leaving[0], "totals": leaving[1]}
    sums_of = [name for name in ("D", "bias") if name in extras]
    base_rows = 16 if plan.chunk % 16 == 0 else 8

    def body(plan, direction, *refs):
        queue = list(refs)
        stream_refs = {name: queue.pop(0) for name in names}
        a_ref = queue.pop(0)
        extra = {name: queue.pop(0) for name in extras}
        of_direction = [stream_refs["g"], *(queue.pop(0) for _ in y_bar[1:])]
        stream_refs["g"] = of_direction[direction]
        du_ref, ddelta_ref, dbc_ref, dA_ref = (queue.pop(0) for _ in range(4))
        sum_refs = {name: queue.pop(0) for name in sums_of}
        (
            tiles,
            steps_ref,
            inputs_ref,
            shares,
            du_tile,
            ddelta_tile,
            dbc_tile,
            barrier,
        ) = queue

        reader = StepReader(plan, layouts, interpret)
        stream = _BackwardStream(plan, direction, stream_refs, tiles, barrier)
        layout = tile_layout(plan.chunk)
        block, part, split = stream.block, stream.part, lax.axis_index("split")
        columns, weights = plan.columns(block), plan.columns(block, direction)
        stream.begin()
        decays = reader.decays(a_ref.at[weights])
        vectors = {
            n: channel_vectors([extra[n]], weights, plan)[0] for n in ("D", "bias") if n in extra
        }

        def last_bar(batch):
            if "last" not in extra:
                return reader.zeros()
            return reader.state(extra["last"].at[batch, columns])

        carry = reader.zeros() if plan.sequences > 1 else last_bar(part)
        if plan.splits > 1:
            carry = entering_state(
                reader,
                decays,
                extra["ends"].at[part, :, columns],
                extra["totals"].at[part, :, columns],
                plan.splits - 1 - split,
                carry,
            )

        # The steps of a chunk in the order of the way back; the factors of the first ones fit into registers as well.
        visits = list(plan.steps() if plan.reverse else reversed(plan.steps()))
        together, kept = _ahead(plan)

        def chunk(k, carry):
            carry, dA, *sums = carry
            slot = stream.wait(k)
            batch, start = stream.batch(k), plan.start(stream.chunk(k))
            if plan.sequences > 1:
                carry = last_bar(batch)
            prepare_tile(
                tiles["delta"].at[slot],
                tiles["x"].at[slot],
                steps_ref,
                inputs_ref,
                vectors.get("bias"),
                start,
                plan,
                True,
                interpret,
            )
            plgpu.commit_smem()

            # Unrolled, so that the states of the whole chunk stay in registers.
            state = reader.state(tiles["h"].at[slot]) if "h" in sources else reader.zeros()
            history = []
            for t in reversed(visits):
                step = reader.over_state(reader.channel(steps_ref.at[t]))
                added = reader.over_state(reader.channel(inputs_ref.at[t]))
                added = added * reader.coefficients(tiles["b"].at[slot, t])
                factor = lax.exp2(step * decays)
                history.append((state, factor))
                state = factor * state + added

            # The tiles sent out last time must have left before they are written again.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            for first in range(0, len(visits), together):
                group = {}
                for i, t in enumerate(visits[first : first + together], first):
                    before, factor = history.pop()
                    step = reader.over_state(reader.channel(steps_ref.at[t]))
                    x = reader.over_state(reader.channel(inputs_ref.at[t]))
                    dy = reader.channel(tiles["g"].at[slot, t]).astype(jnp.float32)
                    dy = reader.over_state(dy)
                    if i >= kept:
                        factor = lax.exp2(step * decays)
                    gradient = carry + reader.coefficients(tiles["c"].at[slot, t]) * dy
                    through_b = gradient * reader.coefficients(tiles["b"].at[slot, t])
                    carry = factor * gradient
                    decayed = carry * before
                    parts = [jnp.sum(part, axis=2) for part in (through_b, decayed * decays)]
                    group[t] = [gradient * x, dy * state], parts
                    dA = dA + decayed * step
                    state = before
                # Written together, last: the compiler lets no read pass a write.
                for t, (_, parts) in group.items():
                    for kind, part in enumerate(parts):
                        store(shares.at[kind, :, t, :], part)
                terms = [term for t in sorted(group) for term in group[t][0]]
                rows = pl.ds(min(group), len(group))
                store(dbc_tile.at[rows], lane_sums(terms, layouts, interpret, plan.tf32_sums))
            plgpu.commit_smem()

            def shared(kind):
                total = plgpu.load(shares.at[kind, 0], layout=layout, optimized=False)
                for w in range(1, plan.warps):
                    total = total + plgpu.load(shares.at[kind, w], layout=layout, optimized=False)
                return total

            def tile(ref):
                return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

            through_b, through_decay = shared(0), shared(1) * math.log(2.0)
            x, dy, step = tile(tiles["x"].at[slot]), tile(tiles["g"].at[slot]), tile(steps_ref)
            du = step * through_b
            if "D" in vectors:
                du = du + dy * along_channels(vectors["D"], plan, layout)
            dstep = x * through_b + through_decay
            if plan.softplus:
                raw = raw_steps(tiles["delta"].at[slot], vectors.get("bias"), plan, layout)
                dstep = dstep * sigmoid(raw, layout, interpret)
            if plan.ragged:
                dstep = jnp.where(tile_rows(start, plan, layout) < plan.length, dstep, 0.0)
            store(du_tile, du.astype(u.dtype))
            store(ddelta_tile, dstep.astype(delta.dtype))
            summands = {"D": lambda: x * dy, "bias": lambda: dstep}
            sums = [
                total + _fold_rows(summands[name](), base_rows)
                for name, total in zip(sums_of, sums, strict=True)
            ]
            plgpu.commit_smem()
            rows = pl.ds(start, plan.chunk)
            plgpu.copy_smem_to_gmem(du_tile, du_ref.at[batch, rows, columns])
            plgpu.copy_smem_to_gmem(ddelta_tile, ddelta_ref.at[batch, rows, columns])
            if plan.chunks == 1:  # A bulk copy is not clipped.
                steps = pl.ds(0, plan.length)
                plgpu.copy_smem_to_gmem(dbc_tile.at[steps], dbc_ref.at[block, batch, steps])
            else:
                plgpu.copy_smem_to_gmem(dbc_tile, dbc_ref.at[block, batch, rows])
            stream.refill(k, slot)
            return (carry, dA, *sums)

        no_sum = plgpu.layout_cast(jnp.zeros((base_rows, plan.channels), jnp.float32), layout)
        result = lax.fori_loop(
            0, plan.visits, chunk, (carry, reader.zeros(), *[no_sum] * len(sums_of))
        )
        store(dA_ref.at[part, split, columns], reader.to_store(result[1]))
        for name, total in zip(sums_of, result[2:], strict=True):
            store(sum_refs[name].at[part, split, columns], jnp.sum(total, axis=0))
        plgpu.wait_smem_to_gmem(0)

    tile = (plan.chunk, plan.channels)
    parts = (plan.parts, plan.splits)
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    bc_steps = plan.length if plan.chunks == 1 else plan.chunks * plan.chunk
    tiles = input_tiles(plan, plan.slots, {n: s.dtype for n, s in sources.items() if n != "h"})
    if states is not None:
        stored = (plan.channels, plan.warps, plan.rest)
        tiles["h"] = plgpu.SMEM((plan.slots, *stored), jnp.float32)
    outputs = gpu_kernel(
        by_direction(plan, body),
        out_type=[
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(delta.shape, delta.dtype),
            # Of several chunks, whole ones: contiguous tiles leave by plain bulk copies, which are
            # not clipped at the end of a sequence.
            float32(plan.blocks, plan.batch, bc_steps, 2, plan.warps, plan.rest),
            float32(*parts, *plan.stored_shape),
            *[float32(*parts, plan.padded_width) for _ in sums_of],
        ],
        scratch_types=[
            tiles,
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM((2, plan.warps, *tile), jnp.float32),
            plgpu.SMEM(tile, u.dtype),
            plgpu.SMEM(tile, delta.dtype),
            plgpu.SMEM((plan.chunk, 2, plan.warps, plan.rest), jnp.float32),
            plgpu.Barrier(num_arrivals=len(sources), num_barriers=plan.slots),
        ],
        compiler_params=dataclasses.replace(compiler_params(), reduction_scratch_bytes=2048),
        interpret=interpret_params(interpret),
        kernel_name="selective_scan_gradients",
        **plan.mesh(plan.splits),
    )(*sources.values(), A, *extras.values(), *y_bar[1:])
    return dict(zip(["u", "delta", "bc", "A", *sums_of], outputs, strict=True))


def _fold_rows(tile: jax.Array, rows: int) -> jax.Array:
    """Add the groups of ``rows`` rows of a tile: what a thread holds, without exchange."""
    if tile.shape[0] == rows:
        return tile
    return jnp.sum(tile.reshape(-1, rows, tile.shape[1]), axis=0)

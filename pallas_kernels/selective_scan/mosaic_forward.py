"""Forward selective scan as a Mosaic GPU kernel (Hopper and newer).

A block owns ``channels`` channels of one sequence. It walks its part of the time axis in chunks, which the copy engine
brings into shared memory. For each chunk the block

1. computes the step sizes softplus(delta + bias) and their products with u, for the whole tile;
2. runs the recurrence step by step. Each warp holds some of the states and adds up their part of y;
3. sums the warps' parts of y, adds the skip D · u, applies the gate silu(z), and copies the tile out.

One launch may hold both directions of a mixer. Each block then picks the code of its own direction, which is the same
as in a launch of one direction (`by_direction`).

If batch and channels are too few to fill the GPU, the time axis is cut into ``splits``. `split_ends` computes the state
that each split reaches from a zero state. In `scan`, every block first combines the end states of the splits before its
own. `mosaic_walk` explains words such as tile and split.

Letters: b batch, l steps, e channels (padded to whole blocks where marked so), g groups of B and C, k chunks, s splits.
The n states of a channel are stored as w · r: ``plan.warps`` groups of ``plan.rest`` states. A kernel gets one
reference per operand, in the order of the call, then its results, then its scratch memory: ``body`` takes them in this
order from a list.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import gpu_kernel, interpret_params, sigmoid, store
from pallas_kernels.selective_scan.mosaic_common import StateLayouts, tile_layout
from pallas_kernels.selective_scan.mosaic_walk import (
    StepReader,
    Stream,
    along_channels,
    by_direction,
    channel_vectors,
    entering_state,
    in_turns,
    input_tiles,
    prepare_tile,
)


@functools.partial(jax.jit, static_argnames=("plan", "scaled", "post_decay", "interpret"))
def split_ends(x, delta, coefficients, A, bias, plan, *, scaled, post_decay, interpret):
    """Compute the state that each split reaches from a zero state, for all splits but the last.

    Args:
        x: a list of arrays ``b l e``: one for both directions together, or one for each.
        delta: ``b l e``.
        coefficients: ``b l g w r`` float32: B, or C in the backward pass.
        A: ``e w r`` float32, padded.
        bias: ``e`` float32, padded, or None.
        plan: how the scan is cut into blocks and chunks.
        scaled: the input of a step is step size · x instead of x.
        post_decay: a step also decays what it has just added. The backward pass needs this.
        interpret: run on the CPU, in Pallas's interpreter.

    Returns:
        The end states ``b s-1 e w r``, and the sums of the step sizes of every split ``b s-1 e``, both float32.
    """
    layouts = StateLayouts(plan.warps, plan.rest)
    of = "x" if len(x) == 1 else "g"
    sources = {of: x[0], "delta": delta, "b": coefficients}
    names = list(sources)
    has_bias = bias is not None

    def body(plan, direction, *refs):
        stream_refs = dict(zip(names, refs[:3], strict=True))
        rest = list(refs[3:])
        a_ref = rest.pop(0)
        bias_ref = rest.pop(0) if has_bias else None
        of_direction = [stream_refs[of], *(rest.pop(0) for _ in x[1:])]
        stream_refs[of] = of_direction[direction if x[1:] else 0]
        ends_ref, totals_ref, tiles, steps_ref, inputs_ref, barrier = rest
        reader = StepReader(plan, layouts, interpret)
        stream = Stream(plan, direction, stream_refs, tiles, barrier)
        columns, weights = plan.columns(stream.block), plan.columns(stream.block, direction)
        stream.begin()
        decays = reader.decays(a_ref.at[weights])
        bias_vector = channel_vectors([bias_ref], weights, plan)[0] if has_bias else None

        def chunk(k, carry):
            slot = stream.wait(k)
            start = plan.start(stream.chunk(k))
            prepare_tile(
                tiles["delta"].at[slot],
                tiles[of].at[slot],
                steps_ref,
                inputs_ref,
                bias_vector,
                start,
                plan,
                scaled,
                interpret,
            )
            plgpu.commit_smem()

            def turn(steps, carry):
                state, total = carry
                for t in steps:
                    step = reader.channel(steps_ref.at[t])
                    factor = lax.exp2(reader.over_state(step) * decays)
                    added = reader.over_state(reader.channel(inputs_ref.at[t]))
                    added = added * reader.coefficients(tiles["b"].at[slot, t])
                    state = factor * (state + added) if post_decay else factor * state + added
                    total = total + step
                return state, total

            carry = in_turns(plan, turn, carry)
            plgpu.commit_smem()
            stream.refill(k, slot)
            return carry

        no_steps = plgpu.layout_cast(jnp.zeros((plan.channels,), jnp.float32), layouts.channel)
        state, total = lax.fori_loop(0, plan.per_split, chunk, (reader.zeros(), no_steps))
        split = lax.axis_index("split")
        store(ends_ref.at[stream.batch(0), split, columns], reader.to_store(state))
        store(totals_ref.at[stream.batch(0), split, columns], total)

    shape = (plan.batch, plan.splits - 1)
    tile = (plan.chunk, plan.channels)
    operands = [*sources.values(), A] + ([bias] if has_bias else []) + x[1:]
    return gpu_kernel(
        by_direction(plan, body),
        out_type=[
            jax.ShapeDtypeStruct((*shape, *plan.stored_shape), jnp.float32),
            jax.ShapeDtypeStruct((*shape, plan.padded_width), jnp.float32),
        ],
        scratch_types=[
            input_tiles(plan, plan.slots, {n: s.dtype for n, s in sources.items()}),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.Barrier(num_arrivals=len(sources), num_barriers=plan.slots),
        ],
        interpret=interpret_params(interpret),
        kernel_name="selective_scan_split_ends",
        **plan.mesh(plan.splits - 1),
    )(*operands)


@functools.partial(
    jax.jit, static_argnames=("plan", "save_states", "last_state", "dtype", "interpret")
)
def scan(
    u, delta, B, C, A, D, z, bias, entering, plan, *, save_states, last_state, dtype, interpret
):
    """Run the scan.

    Two directions lie one after the other: along e in A, D and bias, along b in all other arrays.

    Args:
        u, delta, z: ``b l e``; z may be None.
        B, C: ``b l g w r`` float32.
        A: ``e w r`` float32, padded.
        D, bias: ``e`` float32, padded, or None.
        entering: result of `split_ends`; read only if ``plan.splits > 1``.
        plan: how the scan is cut into blocks and chunks.
        save_states: also return the state that enters every chunk.
        last_state: also return the state after the last step.
        dtype: dtype of y.
        interpret: run on the CPU, in Pallas's interpreter.

    Returns:
        A list: y ``b l e`` of each direction; with `save_states` the entering states ``b k e w r``; with `last_state`
        the last state ``b e w r``. States are float32.
    """
    layouts = StateLayouts(plan.warps, plan.rest)
    sources = {"x": u, "delta": delta, "b": B, "c": C} | ({} if z is None else {"z": z})
    names = list(sources)
    extras = {"D": D, "bias": bias}
    extras = {name: value for name, value in extras.items() if value is not None}
    if plan.splits > 1:
        extras |= {"ends": entering[0], "totals": entering[1]}

    def body(plan, direction, *refs):
        queue = list(refs)
        stream_refs = {name: queue.pop(0) for name in names}
        a_ref = queue.pop(0)
        extra = {name: queue.pop(0) for name in extras}
        y_ref = [queue.pop(0) for _ in range(plan.directions)][direction]
        states_ref = queue.pop(0) if save_states else None
        last_ref = queue.pop(0) if last_state else None
        tiles, steps_ref, inputs_ref, shares_ref, y_tile, barrier = queue

        reader = StepReader(plan, layouts, interpret)
        stream = Stream(plan, direction, stream_refs, tiles, barrier)
        layout = tile_layout(plan.chunk)
        block, batch, split = stream.block, stream.batch(0), lax.axis_index("split")
        columns, weights = plan.columns(block), plan.columns(block, direction)
        stream.begin()
        decays = reader.decays(a_ref.at[weights])
        vectors = {
            n: channel_vectors([extra[n]], weights, plan)[0] for n in ("D", "bias") if n in extra
        }
        state = reader.zeros()
        if plan.splits > 1:
            state = entering_state(
                reader,
                decays,
                extra["ends"].at[batch, :, columns],
                extra["totals"].at[batch, :, columns],
                split,
                state,
            )

        def chunk(k, state):
            slot = stream.wait(k)
            start = plan.start(stream.chunk(k))
            if save_states:
                store(
                    states_ref.at[batch, plan.place(stream.chunk(k)), columns],
                    reader.to_store(state),
                )
            # 1) Step sizes, and their products with u.
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

            # 2) The recurrence.
            def turn(steps, state):
                shares = []
                for t in steps:
                    step = reader.over_state(reader.channel(steps_ref.at[t]))
                    added = reader.over_state(reader.channel(inputs_ref.at[t]))
                    added = added * reader.coefficients(tiles["b"].at[slot, t])
                    state = lax.exp2(step * decays) * state + added
                    share = jnp.sum(state * reader.coefficients(tiles["c"].at[slot, t]), axis=2)
                    shares.append((t, share))
                # Write all results after all reads, because the compiler does not move a read before a write.
                for t, share in shares:
                    store(shares_ref.at[:, t, :], share)
                return state

            state = in_turns(plan, turn, state)
            # 3) Sum the warps' parts of y, add the skip, and gate. Before y_tile is written again, wait until the
            # previous copy has read it.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            y = plgpu.load(shares_ref.at[0], layout=layout, optimized=False)
            for w in range(1, plan.warps):
                y = y + plgpu.load(shares_ref.at[w], layout=layout, optimized=False)
            if "D" in vectors:
                x = plgpu.load(tiles["x"].at[slot], layout=layout, optimized=False)
                y = y + x.astype(jnp.float32) * along_channels(vectors["D"], plan, layout)
            if z is not None:
                gate = plgpu.load(tiles["z"].at[slot], layout=layout, optimized=False)
                gate = gate.astype(jnp.float32)
                y = y * gate * sigmoid(gate, layout, interpret)
            store(y_tile, y.astype(dtype))
            plgpu.commit_smem()
            rows = pl.ds(start, plan.chunk)
            plgpu.copy_smem_to_gmem(y_tile, y_ref.at[stream.own(k), rows, columns])
            stream.refill(k, slot)
            return state

        state = lax.fori_loop(0, plan.per_split, chunk, state)
        if last_state:

            @pl.when(split == plan.splits - 1)
            def _():
                store(last_ref.at[batch, columns], reader.to_store(state))

        plgpu.wait_smem_to_gmem(0)

    tile = (plan.chunk, plan.channels)
    states = plan.stored_shape
    of_direction = (plan.batch // plan.directions, *u.shape[1:])
    out = [jax.ShapeDtypeStruct(of_direction, dtype)] * plan.directions
    if save_states:
        out.append(jax.ShapeDtypeStruct((plan.batch, plan.chunks, *states), jnp.float32))
    if last_state:
        out.append(jax.ShapeDtypeStruct((plan.batch, *states), jnp.float32))
    return gpu_kernel(
        by_direction(plan, body),
        out_type=out,
        scratch_types=[
            input_tiles(plan, plan.slots, {n: s.dtype for n, s in sources.items()}),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM((plan.warps, *tile), jnp.float32),
            plgpu.SMEM(tile, dtype),
            plgpu.Barrier(num_arrivals=len(sources), num_barriers=plan.slots),
        ],
        interpret=interpret_params(interpret),
        kernel_name="selective_scan",
        **plan.mesh(plan.splits),
    )(*sources.values(), A, *extras.values())

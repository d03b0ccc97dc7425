"""Forward selective scan as a Mosaic GPU kernel (Hopper and newer).

A block owns ``channels`` channels of one sequence and walks its share of the time
axis in chunks brought in by the copy engine.  Of each chunk it first computes the
steps softplus(delta + bias) and their products with u for the whole tile, then runs
the recurrence step by step, and last sums the warps' shares of y, adds the skip and
the gate, and sends the tile out.

One launch may hold both directions of a mixer: a block then first finds out which one it
belongs to and runs that one's code, the same as in a launch of its own.

The time axis is cut into ``splits`` where batch and channels cannot fill the GPU:
:func:`split_ends` finds what each split does to a zero state, then every block of
:func:`scan` first combines the splits before its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_common import (
    LOG2E,
    StateLayouts,
    compiler_params,
    interpret_params,
    relabel,
    sigmoid,
    softplus,
    store,
    tile_channel_layout,
    tile_layout,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a scan is cut: static numbers that shape the kernels.

    length, width, groups: of the scan; channels: of a block; chunk: steps of a tile;
    per_split: chunks of a split; splits: of the time axis; warps, rest: state groups
    and the states of one; unroll: steps per turn of the inner loop; slots: tiles in
    flight; directions: 1, which ``reverse`` gives, or 2: forward in the first half of the
    ``batch`` sequences, in reverse in the second (with ``reverse`` the other way about),
    each half with its own A, D and bias.
    """

    batch: int
    length: int
    width: int
    groups: int
    channels: int
    chunk: int
    splits: int
    warps: int
    rest: int
    unroll: int
    slots: int
    reverse: bool
    softplus: bool
    directions: int = 1

    @property
    def per_split(self) -> int:
        return pl.cdiv(pl.cdiv(self.length, self.chunk), self.splits)

    @property
    def chunks(self) -> int:
        return self.per_split * self.splits

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.width, self.channels)

    @property
    def padded_width(self) -> int:
        return self.blocks * self.channels

    @property
    def ragged(self) -> bool:
        return self.chunks * self.chunk != self.length

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return (self.warps, self.channels, self.rest)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        return (self.padded_width, self.warps, self.rest)

    def place(self, index: Any) -> Any:
        """Where in time the chunk visited as number ``index`` lies."""
        return self.chunks - 1 - index if self.reverse else index

    def start(self, index: Any) -> Any:
        """First step of the chunk visited as number ``index``."""
        return self.place(index) * self.chunk

    def steps(self) -> range:
        return range(self.chunk)

    def group(self, block: Any) -> Any:
        return lax.div(block * self.channels, self.width // self.groups) if self.groups > 1 else 0

    def columns(self, block: Any, direction: int = 0) -> Any:
        """A block's channels, of all directions' one after another."""
        start = block * self.channels
        return pl.ds(start + direction * self.padded_width if direction else start, self.channels)


def by_direction(plan: Plan, body: Callable[..., None]) -> Callable[..., None]:
    """The kernel that runs ``body(plan, direction, *refs)``, where the plan is that of one direction.

    Of two, each has code of its own: a place in time that depended on the block would cost an addition at every
    access, a fifth of a step's instructions. Two conditions, since lowering tries the first branch of each twice.
    """
    if plan.directions == 1:
        return functools.partial(body, plan, 0)

    def kernel(*refs: Any) -> None:
        second = lax.axis_index("batch") >= plan.batch // 2
        for direction, here in enumerate((jnp.logical_not(second), second)):
            own = dataclasses.replace(plan, reverse=bool(direction) != plan.reverse)
            pl.when(here)(functools.partial(body, own, direction, *refs))

    return kernel


def tile_rows(start: Any, plan: Plan, layout: Any) -> jax.Array:
    """The step numbers of a tile, for masking what lies past the end."""
    shape = (plan.chunk, plan.channels)
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 0), layout) + start


def along_channels(vector: jax.Array, plan: Plan, layout: Any) -> jax.Array:
    """A ``(channels,)`` vector repeated over a tile's rows."""
    shape = (plan.chunk, plan.channels)
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (1,)), layout)


def raw_steps(delta_tile: Any, bias: jax.Array | None, plan: Plan, layout: Any):
    """delta + bias of a tile, float32."""
    raw = plgpu.load(delta_tile, layout=layout, optimized=False).astype(jnp.float32)
    return raw if bias is None else raw + along_channels(bias, plan, layout)


def prepare_tile(
    delta_tile: Any,
    x_tile: Any,
    steps_ref: Any,
    inputs_ref: Any,
    bias: jax.Array | None,
    start: Any,
    plan: Plan,
    scaled: bool,
    interpret: bool,
) -> None:
    """Fills the steps and the (scaled) inputs of one tile, both float32, in shared memory."""
    layout = tile_layout(plan.chunk)
    steps = raw_steps(delta_tile, bias, plan, layout)
    if plan.softplus:
        steps = softplus(steps, layout, interpret)
    if plan.ragged:  # past the end nothing decays
        steps = jnp.where(tile_rows(start, plan, layout) < plan.length, steps, 0.0)
    x = plgpu.load(x_tile, layout=layout, optimized=False).astype(jnp.float32)
    store(steps_ref, steps)
    store(inputs_ref, x * steps if scaled else x)


class StepReader:
    """Reads what one step needs, spread over the state's registers."""

    def __init__(self, plan: Plan, layouts: StateLayouts, interpret: bool):
        self.plan, self.layouts, self.interpret = plan, layouts, interpret

    def channel(self, ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=self.layouts.channel, optimized=False)

    def over_state(self, vector: jax.Array) -> jax.Array:
        spread = lax.broadcast_in_dim(vector, self.plan.state_shape, (1,))
        return plgpu.layout_cast(spread, self.layouts.state)

    def coefficients(self, ref: Any) -> jax.Array:
        row = plgpu.load(ref, layout=self.layouts.step, optimized=False)
        spread = lax.broadcast_in_dim(row, self.plan.state_shape, (0, 2))
        return plgpu.layout_cast(spread, self.layouts.state)

    def state(self, ref: Any) -> jax.Array:
        """A state that memory holds as ``(channels, warps, rest)``."""
        layouts = self.layouts
        stored = plgpu.load(ref, layout=layouts.stored, optimized=False)
        return relabel(stored, (1, 0, 2), layouts.stored, layouts.state, self.interpret)

    def to_store(self, state: jax.Array) -> jax.Array:
        """The inverse of :meth:`state`, for writing."""
        layouts = self.layouts
        return relabel(state, (1, 0, 2), layouts.state, layouts.stored, self.interpret)

    def decays(self, a_ref: Any) -> jax.Array:
        """A · log2(e), so that a step's factor is one exp2."""
        return self.state(a_ref) * LOG2E

    def zeros(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(self.plan.state_shape, jnp.float32), self.layouts.state)


AT_ONCE = 4  # splits whose ends are on their way together


def entering_state(
    reader: StepReader, decay: jax.Array, ends: Any, totals: Any, split: Any, initial: jax.Array
) -> jax.Array:
    """State before split ``split``: the earlier splits' ends, each decayed onwards."""
    last = reader.plan.splits - 1

    def absorb(group, state):
        numbers = [group * AT_ONCE + i for i in range(AT_ONCE)]
        read = [
            (reader.channel(totals.at[at]), reader.state(ends.at[at]))
            for at in (jnp.minimum(n, last) for n in numbers)
        ]
        for number, (total, end) in zip(numbers, read, strict=True):
            after = state * lax.exp2(decay * reader.over_state(total)) + end
            state = jnp.where(number < split, after, state)
        return state

    return lax.fori_loop(0, lax.div(split + AT_ONCE - 1, AT_ONCE), absorb, initial)


def _inputs(plan: Plan, slots: int, dtypes: dict[str, Any]) -> dict[str, Any]:
    """Shared-memory tiles of the streamed inputs."""
    tile = (slots, plan.chunk, plan.channels)
    rows = (slots, plan.chunk, plan.warps, plan.rest)
    return {
        name: plgpu.SMEM(rows if name in "bc" else tile, dtype) for name, dtype in dtypes.items()
    }


class Stream:
    """Brings the chunks of a split into shared memory, ``slots`` ahead.

    ``batch`` numbers the sequences of all directions, ``own`` those of this one.
    """

    def __init__(
        self,
        plan: Plan,
        direction: int,
        sources: dict[str, Any],
        tiles: dict[str, Any],
        barrier: Any,
    ):
        self.plan, self.sources, self.tiles, self.barrier = plan, sources, tiles, barrier
        self.batch, self.block = lax.axis_index("batch"), lax.axis_index("block")
        self.own = self.batch - plan.batch // 2 if direction else self.batch
        self.first = lax.axis_index("split") * plan.per_split

    def fetch(self, k: Any, slot: Any) -> None:
        plan = self.plan
        rows = pl.ds(plan.start(self.first + k), plan.chunk)
        for name, source in self.sources.items():
            if name in ("b", "c"):
                part = source.at[self.batch, rows, plan.group(self.block)]
            else:
                batch = self.own if name == "g" else self.batch
                part = source.at[batch, rows, plan.columns(self.block)]
            plgpu.copy_gmem_to_smem(part, self.tiles[name].at[slot], self.barrier.at[slot])

    def begin(self) -> None:
        for k in range(min(self.plan.slots, self.plan.per_split)):
            self.fetch(k, k)

    def wait(self, k: Any) -> Any:
        slot = lax.rem(k, self.plan.slots)
        plgpu.barrier_wait(self.barrier.at[slot])
        return slot

    def refill(self, k: Any, slot: Any) -> None:
        """After everyone is done with chunk ``k``: fetch the one that takes its slot."""

        @pl.when(k + self.plan.slots < self.plan.per_split)
        def _():
            self.fetch(k + self.plan.slots, slot)


def _mesh(plan: Plan) -> dict[str, Any]:
    return {
        "grid": (plan.blocks, plan.splits, plan.batch),
        "grid_names": ("block", "split", "batch"),
    }


def _channel_vectors(refs: list[Any], columns: Any, plan: Plan) -> list[jax.Array]:
    layout = tile_channel_layout(plan.chunk)
    return [plgpu.load(ref.at[columns], layout=layout, optimized=False) for ref in refs]


@functools.partial(jax.jit, static_argnames=("plan", "scaled", "post_decay", "interpret"))
def split_ends(x, delta, coefficients, A, bias, plan, *, scaled, post_decay, interpret):
    """What each split makes of a zero state.

    Args:
        x: a list of ``b l e``, of all directions or one for each; delta: ``b l e``;
            coefficients: ``b l g w r`` float32 (B, or C for the gradients' way back);
            A: ``e w r`` and bias: ``e`` (or None), float32, padded.
        scaled: the input of a step is step · x rather than x.
        post_decay: a step decays what it has added too (the gradients' way back).

    Returns:
        ends ``b s e w r``, and the sum of a split's steps ``b s e``, both float32.
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
        bias_vector = _channel_vectors([bias_ref], weights, plan)[0] if has_bias else None

        def chunk(k, carry):
            slot = stream.wait(k)
            start = plan.start(stream.first + k)
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

            def turn(i, carry):
                state, total = carry
                for j in range(plan.unroll):
                    t = i * plan.unroll + j
                    t = plan.chunk - 1 - t if plan.reverse else t
                    step = reader.channel(steps_ref.at[t])
                    factor = lax.exp2(reader.over_state(step) * decays)
                    added = reader.over_state(reader.channel(inputs_ref.at[t]))
                    added = added * reader.coefficients(tiles["b"].at[slot, t])
                    state = factor * (state + added) if post_decay else factor * state + added
                    total = total + step
                return state, total

            carry = lax.fori_loop(0, plan.chunk // plan.unroll, turn, carry)
            plgpu.commit_smem()
            stream.refill(k, slot)
            return carry

        no_steps = plgpu.layout_cast(jnp.zeros((plan.channels,), jnp.float32), layouts.channel)
        state, total = lax.fori_loop(0, plan.per_split, chunk, (reader.zeros(), no_steps))
        split = lax.axis_index("split")
        store(ends_ref.at[stream.batch, split, columns], reader.to_store(state))
        store(totals_ref.at[stream.batch, split, columns], total)

    shape = (plan.batch, plan.splits)
    tile = (plan.chunk, plan.channels)
    operands = [*sources.values(), A] + ([bias] if has_bias else []) + x[1:]
    return plgpu.kernel(
        by_direction(plan, body),
        out_type=[
            jax.ShapeDtypeStruct((*shape, *plan.stored_shape), jnp.float32),
            jax.ShapeDtypeStruct((*shape, plan.padded_width), jnp.float32),
        ],
        scratch_types=[
            _inputs(plan, plan.slots, {n: s.dtype for n, s in sources.items()}),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.Barrier(num_arrivals=len(sources), num_barriers=plan.slots),
        ],
        compiler_params=compiler_params(),
        interpret=interpret_params(interpret),
        kernel_name="selective_scan_split_ends",
        **_mesh(plan),
    )(*operands)


@functools.partial(jax.jit, static_argnames=("plan", "save_states", "last_state", "interpret"))
def scan(u, delta, B, C, A, D, z, bias, entering, plan, *, save_states, last_state, interpret):
    """The scan itself.

    Args:
        u, delta, z: ``b l e`` (z may be None); B, C: ``b l g w r`` float32; A:
            ``e w r``, and D, bias: ``e`` (or None), float32, padded. Of two directions one
            after the other, along b and (A, D, bias) along e.
        entering: what :func:`split_ends` returned, when ``plan.splits > 1``.
        save_states: also return the state entering every chunk.
        last_state: also return the state after the last step.

    Returns:
        y ``b l e`` in u's dtype, one for each direction; then, where asked for, the entering states
        ``b k e w r`` and the last state ``b e w r``, both float32.
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
        block, batch, split = stream.block, stream.batch, lax.axis_index("split")
        columns, weights = plan.columns(block), plan.columns(block, direction)
        stream.begin()
        decays = reader.decays(a_ref.at[weights])
        vectors = {
            n: _channel_vectors([extra[n]], weights, plan)[0] for n in ("D", "bias") if n in extra
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
            start = plan.start(stream.first + k)
            if save_states:
                store(
                    states_ref.at[batch, plan.place(stream.first + k), columns],
                    reader.to_store(state),
                )
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

            def turn(i, state):
                for j in range(plan.unroll):
                    t = i * plan.unroll + j
                    t = plan.chunk - 1 - t if plan.reverse else t
                    step = reader.over_state(reader.channel(steps_ref.at[t]))
                    added = reader.over_state(reader.channel(inputs_ref.at[t]))
                    added = added * reader.coefficients(tiles["b"].at[slot, t])
                    state = lax.exp2(step * decays) * state + added
                    share = jnp.sum(state * reader.coefficients(tiles["c"].at[slot, t]), axis=2)
                    store(shares_ref.at[:, t, :], share)
                return state

            state = lax.fori_loop(0, plan.chunk // plan.unroll, turn, state)
            # The tile sent out last time must have left before it is written again.
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
            store(y_tile, y.astype(u.dtype))
            plgpu.commit_smem()
            rows = pl.ds(start, plan.chunk)
            plgpu.copy_smem_to_gmem(y_tile, y_ref.at[stream.own, rows, columns])
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
    out = [jax.ShapeDtypeStruct(of_direction, u.dtype)] * plan.directions
    if save_states:
        out.append(jax.ShapeDtypeStruct((plan.batch, plan.chunks, *states), jnp.float32))
    if last_state:
        out.append(jax.ShapeDtypeStruct((plan.batch, *states), jnp.float32))
    return plgpu.kernel(
        by_direction(plan, body),
        out_type=out,
        scratch_types=[
            _inputs(plan, plan.slots, {n: s.dtype for n, s in sources.items()}),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM((plan.warps, *tile), jnp.float32),
            plgpu.SMEM(tile, u.dtype),
            plgpu.Barrier(num_arrivals=len(sources), num_barriers=plan.slots),
        ],
        compiler_params=compiler_params(),
        interpret=interpret_params(interpret),
        kernel_name="selective_scan",
        **_mesh(plan),
    )(*sources.values(), A, *extras.values())

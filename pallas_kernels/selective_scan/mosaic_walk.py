"""Cut a scan into blocks and walk a block's chunks; shared by the forward and the backward kernel.

Words used in the kernels: a *block* is one thread block of the GPU. It owns `channels` channels of one sequence, or of
a few short ones. The time axis is cut into *chunks*; a *tile* is a chunk of these channels in shared memory. A *split*
is a run of consecutive chunks that one block scans. The states of a channel are spread over `warps` warps, `rest`
states in each.
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

from pallas_kernels.mosaic import LOG2E, store
from pallas_kernels.selective_scan.mosaic_common import (
    StateLayouts,
    relabel,
    softplus,
    tile_channel_layout,
    tile_layout,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a scan is cut into blocks and chunks: static numbers that shape the kernels.

    Attributes:
        batch: Number of sequences, of all directions together.
        length: Steps of a sequence.
        width: Channels of a sequence.
        groups: Groups of channels that share B and C.
        channels: Channels of a block.
        chunk: Steps of a tile.
        splits: Number of splits of the time axis.
        warps: Groups of states, one per warp.
        rest: States of a group.
        unroll: Steps per iteration of the inner loop.
        slots: Tiles in flight, for each input.
        reverse: Scan from the last step to the first. With two directions: those of the first half of the batch.
        softplus: Apply softplus to the step sizes.
        directions: 1 or 2. With 2, the second half of the batch is scanned in the opposite direction of the first, and
            each half has its own A, D and bias.
        sequences: Sequences of a block, scanned one after another. More than one only if a sequence is a single chunk.
        tf32_sums: Let tensor cores add up the gradients of B and C over channels, where they can. They truncate what
            they add to 10 bits of mantissa.
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
    sequences: int = 1
    tf32_sums: bool = False

    @property
    def per_split(self) -> int:
        return pl.cdiv(pl.cdiv(self.length, self.chunk), self.splits)

    @property
    def chunks(self) -> int:
        return self.per_split * self.splits

    @property
    def visits(self) -> int:
        """Number of tiles that a block visits: the chunks of its split, or one for each of its sequences."""
        return self.per_split * self.sequences

    @property
    def parts(self) -> int:
        """Number of blocks along the batch. All sequences of one block are scanned in the same direction."""
        return self.batch // self.sequences

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.width, self.channels)

    @property
    def padded_width(self) -> int:
        return self.blocks * self.channels

    def mesh(self, splits: int) -> dict[str, Any]:
        """Return the kernel's grid of blocks for this number of splits."""
        return {
            "grid": (self.blocks, splits, self.parts),
            "grid_names": ("block", "split", "part"),
        }

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
        """Return the position in time, in chunks, of the chunk that is visited as number ``index``."""
        return self.chunks - 1 - index if self.reverse else index

    def start(self, index: Any) -> Any:
        """Return the first step of the chunk that is visited as number ``index``."""
        return self.place(index) * self.chunk

    def steps(self) -> range:
        """Return the steps of a chunk. If there is only one chunk, leave out the steps past the end of the sequence."""
        return range(self.length if self.chunks == 1 else self.chunk)

    def group(self, block: Any) -> Any:
        return lax.div(block * self.channels, self.width // self.groups) if self.groups > 1 else 0

    def columns(self, block: Any, direction: int = 0) -> Any:
        """Return the slice of a block's channels in an array that holds the channels of both directions in turn."""
        start = block * self.channels
        return pl.ds(start + direction * self.padded_width if direction else start, self.channels)


def by_direction(plan: Plan, body: Callable[..., None]) -> Callable[..., None]:
    """Return a kernel that runs ``body(plan, direction, *refs)`` with the plan of the block's own direction.

    With two directions, the body is compiled once for each. If one body served both, positions in time would depend on
    the block, which would add an addition to every access: a fifth of a step's instructions. The two bodies stand under
    two `pl.when` without an else branch, because lowering traces the first branch of a condition twice.
    """
    if plan.directions == 1:
        return functools.partial(body, plan, 0)

    def kernel(*refs: Any) -> None:
        second = lax.axis_index("part") >= plan.parts // 2
        for direction, here in enumerate((jnp.logical_not(second), second)):
            own = dataclasses.replace(plan, reverse=bool(direction) != plan.reverse)
            pl.when(here)(functools.partial(body, own, direction, *refs))

    return kernel


def in_turns(plan: Plan, turn: Callable[[list[Any], Any], Any], carry: Any) -> Any:
    """Loop ``carry = turn(steps, carry)`` over a chunk's steps in scan order, `Plan.unroll` steps at a time."""
    steps = plan.steps()
    last = len(steps) - 1

    def of(i, count):
        numbers = [i * plan.unroll + j for j in range(count)]
        return [last - n for n in numbers] if plan.reverse else numbers

    whole, left = divmod(len(steps), plan.unroll)
    carry = lax.fori_loop(0, whole, lambda i, carry: turn(of(i, plan.unroll), carry), carry)
    return turn(of(whole, left), carry) if left else carry


def tile_rows(start: Any, plan: Plan, layout: Any) -> jax.Array:
    """Return the step number of every element of a tile, to mask steps past the end of the sequence."""
    shape = (plan.chunk, plan.channels)
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 0), layout) + start


def along_channels(vector: jax.Array, plan: Plan, layout: Any) -> jax.Array:
    """Repeat a ``(channels,)`` vector over a tile's rows."""
    shape = (plan.chunk, plan.channels)
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (1,)), layout)


def raw_steps(delta_tile: Any, bias: jax.Array | None, plan: Plan, layout: Any):
    """Return delta + bias of a tile, in float32."""
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
    """Write a tile's step sizes and inputs to shared memory, in float32; with `scaled`, inputs times step sizes."""
    layout = tile_layout(plan.chunk)
    steps = raw_steps(delta_tile, bias, plan, layout)
    if plan.softplus:
        steps = softplus(steps, layout, interpret)
    if plan.ragged:  # A step size of zero past the end leaves the state unchanged.
        steps = jnp.where(tile_rows(start, plan, layout) < plan.length, steps, 0.0)
    x = plgpu.load(x_tile, layout=layout, optimized=False).astype(jnp.float32)
    store(steps_ref, steps)
    store(inputs_ref, x * steps if scaled else x)


class StepReader:
    """Reads the operands of one step and broadcasts them to the layout that the state has in registers."""

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
        """Read a state, stored as ``(channels, warps, rest)``, into the state's register layout."""
        layouts = self.layouts
        stored = plgpu.load(ref, layout=layouts.stored, optimized=False)
        return relabel(stored, (1, 0, 2), layouts.stored, layouts.state, self.interpret)

    def to_store(self, state: jax.Array) -> jax.Array:
        """Convert a state from its register layout to ``(channels, warps, rest)``, to store it."""
        layouts = self.layouts
        return relabel(state, (1, 0, 2), layouts.state, layouts.stored, self.interpret)

    def decays(self, a_ref: Any) -> jax.Array:
        """Return A · log2(e), so that the factor exp(step · A) of a step is one exp2."""
        return self.state(a_ref) * LOG2E

    def zeros(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(self.plan.state_shape, jnp.float32), self.layouts.state)


AT_ONCE = 4  # splits whose end states are loaded at the same time


def entering_state(
    reader: StepReader, decay: jax.Array, ends: Any, totals: Any, split: Any, initial: jax.Array
) -> jax.Array:
    """Compute the state that enters ``split``: the sum of the earlier splits' end states, each decayed up to here."""
    last = reader.plan.splits - 2

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


def input_tiles(plan: Plan, slots: int, dtypes: dict[str, Any]) -> dict[str, Any]:
    """Allocate the shared-memory tiles of the streamed inputs."""
    tile = (slots, plan.chunk, plan.channels)
    rows = (slots, plan.chunk, plan.warps, plan.rest)
    return {
        name: plgpu.SMEM(rows if name in "bc" else tile, dtype) for name, dtype in dtypes.items()
    }


class Stream:
    """Copies the tiles that a block visits (`Plan.visits`) into shared memory, up to ``slots`` tiles ahead.

    ``batch(k)`` is the index of visit k's sequence among those of both directions, ``own(k)`` its index among those of
    this direction.
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
        self.direction = direction
        self.part, self.block = lax.axis_index("part"), lax.axis_index("block")
        self.first = lax.axis_index("split") * plan.per_split

    def batch(self, k: Any) -> Any:
        sequences = self.plan.sequences
        return self.part * sequences + k if sequences > 1 else self.part

    def own(self, k: Any) -> Any:
        return self.batch(k) - self.plan.batch // 2 if self.direction else self.batch(k)

    def chunk(self, k: Any) -> Any:
        """Return which chunk of its sequence visit k reads, counted in the order of the scan."""
        return self.first + k if self.plan.sequences == 1 else self.first  # The only chunk, 0.

    def fetch(self, k: Any, slot: Any) -> None:
        plan = self.plan
        rows = pl.ds(plan.start(self.chunk(k)), plan.chunk)
        for name, source in self.sources.items():
            if name == "h":
                where = self.batch(k), plan.place(self.chunk(k)), plan.columns(self.block)
            elif name in ("b", "c"):
                where = self.batch(k), rows, plan.group(self.block)
            else:
                batch = self.own(k) if name == "g" else self.batch(k)
                where = batch, rows, plan.columns(self.block)
            plgpu.copy_gmem_to_smem(
                source.at[where], self.tiles[name].at[slot], self.barrier.at[slot]
            )

    def begin(self) -> None:
        for k in range(min(self.plan.slots, self.plan.visits)):
            self.fetch(k, k)

    def wait(self, k: Any) -> Any:
        slot = lax.rem(k, self.plan.slots)
        plgpu.barrier_wait(self.barrier.at[slot])
        return slot

    def refill(self, k: Any, slot: Any) -> None:
        """Fetch the next tile into the slot of tile ``k``. Call this when no warp reads tile ``k`` any more."""

        @pl.when(k + self.plan.slots < self.plan.visits)
        def _():
            self.fetch(k + self.plan.slots, slot)


def channel_vectors(refs: list[Any], columns: Any, plan: Plan) -> list[jax.Array]:
    """Load vectors of this block's channels, in the layout that `along_channels` expects."""
    layout = tile_channel_layout(plan.chunk)
    return [plgpu.load(ref.at[columns], layout=layout, optimized=False) for ref in refs]

"""The selective scan on Hopper and newer GPUs: prepares arrays for the Mosaic GPU kernels.

What a call saves for its gradient is its inputs and, every 8 or 16 steps, the state
(n float32 a channel); nothing if the scan is no longer than that.  See
`mosaic_walk`, `mosaic_forward` and `mosaic_backward` for the kernels.

Both directions of a mixer come as inputs whose b holds the sequences of the first and then
those of the second, and whose A, D and delta_bias have a leading axis of two: see
`mosaic_bidirectional`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.mosaic import PROCESSORS, WARPS
from pallas_kernels.selective_scan import mosaic_backward, mosaic_forward, tuned
from pallas_kernels.selective_scan.mosaic_walk import Plan
from pallas_kernels.selective_scan.types import (
    ScanForward,
    ScanInputs,
    ScanOptions,
    ScanOutput,
)

MAX_STATES = 64
ENOUGH_BLOCKS = 384  # of 128 threads: about three for each processor of an H100
MANY_BLOCKS = (
    6000  # of 64 channels: those of FastVim-B's scans of both directions at batch 128 are 6,144
)
RESIDENT = 3  # blocks of the gradients' kernel that a processor's registers hold
START = 1.5  # what starting one costs, in tiles


def unsupported(inputs: ScanInputs) -> str | None:
    """Return why the kernels cannot take these inputs, or None."""
    for name, x in inputs._asdict().items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and the kernels compute in float32"
    if inputs.initial_state is not None:
        return "it starts from a given state, and the kernels start from zero"
    if not all(isinstance(size, int) for size in inputs.u.shape):
        return f"u {inputs.u.shape} has a symbolic size"
    if inputs.u.size == 0:
        return f"u {inputs.u.shape} is empty"
    states = inputs.A.shape[-1]
    if states > MAX_STATES:
        return f"it has {states} states, and the kernels hold at most {MAX_STATES}"
    width, groups = inputs.u.shape[2], inputs.B.shape[2]
    if groups > 1 and (width // groups) % 32:
        return f"groups of {width // groups} channels are not made of whole blocks of 32"
    return None


def chunk_length(inputs: ScanInputs) -> int:
    """Choose the steps between the states kept for the gradient: what the backward kernel holds in registers."""
    measured = tuned.find(inputs, gradient=True)
    if measured is not None:
        return measured.chunk
    length, states = inputs.u.shape[1], inputs.A.shape[-1]
    return 8 if length <= 8 or states > 16 or _two_channels_a_lane(inputs) else 16


def _two_channels_a_lane(inputs: ScanInputs) -> bool:
    """Return whether the gradient's blocks have 64 channels and not 32.

    Two channels share a lane's reads of B and C and its sums of dB and dC, at half the
    parallelism: a gain where there are blocks enough, or where time is cut anyway.
    """
    batch, length, width = inputs.u.shape
    states, of_group = inputs.A.shape[-1], width // inputs.B.shape[2]
    if length <= 16 or states > 16 or width < 64 or (of_group != width and of_group % 64):
        return False
    blocks = math.ceil(width / 64) * batch
    return blocks >= 600 or (4 * blocks <= ENOUGH_BLOCKS and length >= 2048)


def _wide_forward(inputs: ScanInputs) -> bool:
    """Return whether blocks of scans that keep nothing have 64 channels and not 32.

    So it is where this was measured as faster: scans of both directions that are one tile of 16 steps, in very many
    blocks.
    """
    batch, length, width = inputs.u.shape
    one_tile = 8 < length <= 16 and inputs.A.shape[-1] <= 16 and inputs.B.shape[2] == 1
    many = width % 64 == 0 and width // 64 * batch >= MANY_BLOCKS
    return _directions(inputs) == 2 and one_tile and many


def forward_chunk(inputs: ScanInputs) -> int:
    """Choose the steps of a tile where nothing is kept: little padding first, then few tiles."""
    measured = tuned.find(inputs, gradient=False)
    if measured is not None:
        return measured.chunk
    length = inputs.u.shape[1]
    sizes = (8, 16, 24, 32, 40)
    return min(sizes, key=lambda size: (math.ceil(length / size) * size * (1 + 0.8 / size), size))


def plan(inputs: ScanInputs, options: ScanOptions, chunk: int) -> Plan:
    """Cut a scan into blocks."""
    batch, length, width = inputs.u.shape
    groups, states = inputs.B.shape[2], inputs.A.shape[-1]
    if options.keep_boundaries:
        # A device's share of a sharded scan may call for other blocks than the whole, which chose the chunk.
        wide = options.chunk <= 8 and _two_channels_a_lane(inputs)
    else:
        wide = _wide_forward(inputs)
    channels = 64 if wide else 32
    rest = max(4, 2 ** math.ceil(math.log2(states / WARPS)))  # whole 16 bytes
    chunks = math.ceil(length / chunk)
    blocks = math.ceil(width / channels) * batch
    splits = 1
    if 2 * blocks <= ENOUGH_BLOCKS:  # and no split shorter than 8 tiles
        enough = ENOUGH_BLOCKS
        if _directions(inputs) == 2 and not options.keep_boundaries:
            # 4 % faster at 2 x 16,384 steps; one direction is 2 % slower so.
            enough *= 2
        splits = max(1, min(enough // blocks, chunks // 8))
    measured = tuned.find(inputs, options.keep_boundaries)
    if measured is not None and measured.chunk == chunk:
        channels, splits = measured.channels, measured.splits
    return Plan(
        batch=batch,
        length=length,
        width=width,
        groups=groups,
        channels=channels,
        chunk=chunk,
        splits=splits,
        warps=WARPS,
        rest=rest,
        unroll=8 if rest <= 4 else 2,
        slots=min(2, math.ceil(chunks / splits)),
        reverse=options.reverse,
        softplus=options.delta_softplus,
        directions=_directions(inputs),
    )


def _sequences(cut: Plan) -> int:
    """Choose how many sequences a block of the gradients' kernel visits: for the fewest waves of blocks times tiles.

    The next tile is on its way meanwhile, and what belongs to the channels is read and added up once. The forward
    kernel gains nothing by it.
    """

    def cost(sequences):
        waves = math.ceil(cut.blocks * cut.batch / sequences / (PROCESSORS * RESIDENT))
        return waves * (sequences + START), sequences

    if cut.chunks > 1:
        return 1
    return min((n for n in range(1, 17) if (cut.batch // cut.directions) % n == 0), key=cost)


def _directions(inputs: ScanInputs) -> int:
    return inputs.A.shape[0] if inputs.A.ndim == 3 else 1


@dataclasses.dataclass(frozen=True)
class _Operands:
    """The inputs as the kernels want them."""

    plan: Plan
    u: jax.Array
    delta: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    z: jax.Array | None
    bias: jax.Array | None


def _pad_to(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def _cut(inputs: ScanInputs, options: ScanOptions, chunk: int) -> Plan:
    """Make the plan, of rows that the copy engine can address: whole 16 bytes."""
    width = max(32, math.ceil(inputs.u.shape[2] / 8) * 8)
    return dataclasses.replace(plan(inputs, options, chunk), width=width)


def _streamed_length(cut: Plan) -> int:
    """Return the steps that streamed arrays need to have.

    A tile as wide as the array leaves by a plain bulk copy, which knows no end of a sequence: there all splits' whole
    tiles have a place, also those past the end.
    """
    return cut.chunks * cut.chunk if cut.channels == cut.width else cut.length


def _operands(inputs: ScanInputs, options: ScanOptions, chunk: int) -> _Operands:
    reason = unsupported(inputs)
    if reason is not None:
        raise NotImplementedError(f"selective_scan: implementation 'pallas' cannot run: {reason}")
    cut = _cut(inputs, options, chunk)
    length, width = _streamed_length(cut), cut.width
    states = cut.warps * cut.rest

    def streamed(x):
        return None if x is None else _pad_to(_pad_to(x, 1, length), 2, width)

    def per_step(x):
        x = _pad_to(_pad_to(x.astype(jnp.float32), 1, length), 3, states)
        return x.reshape(*x.shape[:3], cut.warps, cut.rest)

    def per_channel(x):
        if x is None:
            return None
        return _pad_to(x.astype(jnp.float32), x.ndim - 1, cut.padded_width).reshape(-1)

    return _Operands(
        plan=cut,
        u=streamed(inputs.u),
        delta=streamed(inputs.delta),
        A=_state_in(inputs.A, cut).reshape(-1, cut.warps, cut.rest),
        B=per_step(inputs.B),
        C=per_step(inputs.C),
        D=per_channel(inputs.D),
        z=streamed(inputs.z),
        bias=per_channel(inputs.delta_bias),
    )


def _state_in(x: jax.Array, cut: Plan) -> jax.Array:
    """Reshape ``... e n`` to ``... e w r``, padded, float32."""
    x = _pad_to(x.astype(jnp.float32), x.ndim - 1, cut.warps * cut.rest)
    x = _pad_to(x, x.ndim - 2, cut.padded_width)
    return x.reshape(*x.shape[:-1], cut.warps, cut.rest)


def _state_out(x: jax.Array, width: int, states: int) -> jax.Array:
    """Invert `_state_in`."""
    return x.reshape(*x.shape[:-2], -1)[..., :width, :states]


def _run(o: _Operands, *, save_states: bool, last_state: bool, dtype: jnp.dtype) -> list[jax.Array]:
    entering = None
    if o.plan.splits > 1:
        entering = mosaic_forward.split_ends(
            [o.u], o.delta, o.B, o.A, o.bias, o.plan,
            scaled=True, post_decay=False, interpret=gpu.interpreted(),
        )  # fmt: skip
    return mosaic_forward.scan(
        o.u, o.delta, o.B, o.C, o.A, o.D, o.z, o.bias, entering, o.plan,
        save_states=save_states, last_state=last_state, dtype=dtype, interpret=gpu.interpreted(),
    )  # fmt: skip


def forward(inputs: ScanInputs, options: ScanOptions) -> ScanForward:
    """See `types.Backend`."""
    return _forward(inputs, options, jnp.dtype(options.y_dtype or inputs.u.dtype))


def _forward(inputs: ScanInputs, options: ScanOptions, dtype: jnp.dtype) -> ScanForward:
    _, length, width = inputs.u.shape
    chunk = options.chunk if options.keep_boundaries else forward_chunk(inputs)
    o = _operands(inputs, options, chunk)
    save = options.keep_boundaries and o.plan.chunks > 1
    more = gpu.run_once(
        _run(o, save_states=save, last_state=options.return_last_state, dtype=dtype)
    )
    y = [more.pop(0)[:, :length, :width] for _ in range(o.plan.directions)]
    states = inputs.A.shape[-1]
    boundaries = last_state = None
    if save:
        boundaries = _state_out(more.pop(0), width, states)[:, : math.ceil(length / chunk)]
    if options.return_last_state:
        last_state = _state_out(more.pop(0), width, states)
    return (y[0] if len(y) == 1 else (y[0], y[1])), last_state, boundaries


def backward(
    inputs: ScanInputs,
    options: ScanOptions,
    boundaries: jax.Array | None,
    y_bar: ScanOutput,
    last_state_bar: jax.Array | None,
) -> ScanInputs:
    """See `types.Backend`."""
    _, length, width = inputs.u.shape
    groups, states = inputs.B.shape[2], inputs.A.shape[-1]
    z_bar = None
    if inputs.z is not None:
        assert isinstance(y_bar, jax.Array), "of one direction"
        y_bar, z_bar = _through_gate(inputs, options, y_bar)
    o = _operands(inputs._replace(z=None), options, options.chunk)
    cut, shares = _gradient_shares(o, y_bar, boundaries, last_state_bar)
    bc = shares["bc"].reshape(groups, -1, *shares["bc"].shape[1:4], cut.warps * cut.rest).sum(1)
    bc = jax.lax.optimization_barrier(bc)  # the sums first, in one piece, then their parts
    bc = jnp.moveaxis(bc[:, :, :length], 0, 2)[..., :states]  # b l g 2 n

    def summed(name):
        return _summed(shares[name], cut)

    of_channels = {name: summed(name)[..., :width] for name in ("D", "bias") if name in shares}
    gradients = ScanInputs(
        u=shares["u"][:, :length, :width],
        delta=shares["delta"][:, :length, :width],
        A=_state_out(summed("A"), width, states),
        B=bc[..., 0, :],
        C=bc[..., 1, :],
        D=of_channels.get("D"),
        z=z_bar,
        delta_bias=of_channels.get("bias"),
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, inputs)


def _gradient_shares(
    o: _Operands, y_bar, boundaries, last_state_bar, tf32_sums: bool = False
) -> tuple[Plan, dict]:
    """Return the plan of the gradients' kernel and what it returns, see `mosaic_backward.scan_gradients`."""
    sequences = _sequences(o.plan)
    cut = dataclasses.replace(
        o.plan, sequences=sequences, slots=2 if sequences > 1 else o.plan.slots, tf32_sums=tf32_sums
    )
    y_bars = [
        _pad_to(_pad_to(g, 1, o.u.shape[1]), 2, o.u.shape[2])
        for g in (y_bar if isinstance(y_bar, tuple) else [y_bar])
    ]
    if last_state_bar is not None:
        last_state_bar = _state_in(last_state_bar, cut)
    if boundaries is not None:
        boundaries = _pad_to(_state_in(boundaries, cut), 1, cut.chunks)
    leaving = None
    if cut.splits > 1:
        leaving = mosaic_forward.split_ends(
            y_bars, o.delta, o.C, o.A, o.bias, dataclasses.replace(cut, reverse=not cut.reverse),
            scaled=False, post_decay=True, interpret=gpu.interpreted(),
        )  # fmt: skip
    return cut, mosaic_backward.scan_gradients(
        o.u, o.delta, o.B, o.C, o.A, o.D, o.bias, boundaries, y_bars, leaving, last_state_bar, cut,
        interpret=gpu.interpreted(),
    )  # fmt: skip


def _summed(share: jax.Array, cut: Plan) -> jax.Array:
    """Sum over sequences and splits, for each direction."""
    if cut.directions == 1:
        return share.sum((0, 1))
    return share.reshape(cut.directions, -1, *share.shape[1:]).sum((1, 2))


def short_gradients(inputs: ScanInputs, options: ScanOptions, y_bar: tuple[jax.Array, jax.Array]):
    """Return the gradients of u, Δ, A and Δ's bias of scans of one chunk, and B's and C's as shares.

    The shares ``shares b l 2 n`` are still to be added up. Their sums over channels are in TF32.
    """
    _, length, width = inputs.u.shape
    o = _operands(inputs, options, options.chunk)
    cut, shares = _gradient_shares(o, y_bar, None, None, tf32_sums=True)
    A_bar = _state_out(_summed(shares["A"], cut), width, inputs.A.shape[-1])
    bc = shares["bc"].reshape(*shares["bc"].shape[:4], -1)
    streamed = (shares[name][:, :length, :width] for name in ("u", "delta"))
    return *streamed, A_bar, _summed(shares["bias"], cut)[..., :width], bc


def _through_gate(inputs: ScanInputs, options: ScanOptions, y_bar: jax.Array):
    """Return the gradients of the ungated output (float32) and of z. The ungated output is computed again."""
    options = dataclasses.replace(options, keep_boundaries=False, return_last_state=False)
    y, _, _ = _forward(inputs._replace(z=None), options, jnp.dtype(jnp.float32))
    gated = lambda y, z: y * jax.nn.silu(z.astype(jnp.float32))  # noqa: E731
    _, pull = jax.vjp(gated, y, inputs.z)
    return pull(y_bar.astype(jnp.float32))

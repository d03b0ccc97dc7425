"""What the forward and the backward Mosaic GPU scan kernels share.

One warpgroup (4 warps of 32 lanes) owns a block of channels of one sequence.  The
state of the block has the logical shape ``(warps, channels, rest)``: the ``n`` states
of a channel are cut into ``warps`` groups, one a warp; a lane owns a channel and
keeps the ``rest`` states of its group in registers, as one vector.  What depends on
the channel alone is then replicated over warps, what depends on the state alone over
lanes, and one shared-memory vector load brings a lane its B (or C) of a step.

Neighbouring lanes own channels 0 2 1 3, 4 6 5 7, ...: with lanes in plain order
Mosaic moves single words by ldmatrix, and then also loads what a store overwrites.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import LANES, LOG2E, WARPS, reciprocal, reduced, tiled


class StateLayouts:
    """Register layouts of a ``(warps, channels, rest)`` state and of its parts."""

    def __init__(self, warps: int, rest: int):
        across = WARPS // warps  # warps side by side along the channels
        tiles = (
            (warps, across * LANES, rest),
            (1, LANES, rest),
            *((1, k, rest) for k in (4, 2, 1)),
        )
        base, self.state = tiled(tiles, (-15, -14), (-11, -5, -8), -1)
        self.channel = reduced(base, (0, 2))  # (channels,)
        self.step = reduced(base, (1,))  # (warps, rest)
        # The same values in the same registers, as (channels, warps, rest): how memory holds them.
        tiles = (
            (across * LANES, warps, rest),
            (LANES, 1, rest),
            *((k, 1, rest) for k in (4, 2, 1)),
        )
        _, self.stored = tiled(tiles, (-14, -15), (-12, -6, -9), -1)
        self.warps, self.rest = warps, rest

    def sums(self, steps: int, quads: bool = False) -> Any:
        """Return the layout of ``(steps, 2, warps, rest)``: one value per group of lanes, so at most 32 per warp.

        With `quads`, the four lanes of a quad hold the values of different steps and kinds.
        """
        copies, left = divmod(LANES, 2 * steps * self.rest)
        if left or self.warps != WARPS:
            raise ValueError(
                f"no layout for sums of {steps} steps with {self.rest} states per lane"
            )
        lanes: Any = (-8, -7, -5, plgpu.Replicated(copies)) if copies > 1 else (-8, -7, -5)
        if quads:
            lanes = (-5, plgpu.Replicated(copies), -8, -7)
        return tiled(((steps, 2, WARPS, self.rest), (1, 1, 1, 1)), (-6,), lanes, -1)[1]


@functools.cache
def tile_layout(rows: int) -> Any:
    """Return the layout of a ``(rows, channels)`` tile for the elementwise phases."""
    if rows % 16 == 0:  # a lane holds 4 neighbours: 8 lanes per row, 16 rows a register
        tiles = ((16, 32), (4, 32), (1, 4))
    elif rows % 8 == 0:
        tiles = ((8, 32), (2, 32), (1, 2))
    else:
        raise ValueError(f"tile rows must be a multiple of 8, got {rows}")
    return tiled(tiles, (-6,), (-4, -3), -1)[1]


@functools.cache
def tile_channel_layout(rows: int) -> Any:
    """Return the layout of a ``(channels,)`` vector that broadcasts along a tile's rows."""
    return reduced(tile_layout(rows).to_mgpu(), (0,))


def softplus(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """Compute log(1 + exp(x)) to float32 rounding, also where it is tiny.

    With e = exp(-|x|) and s = e / (2 + e) in (0, 1/3], log1p(e) = 2 atanh(s).
    """
    e = lax.exp2(lax.abs(x) * -LOG2E)
    s = e * reciprocal(e + 2.0, layout, interpret)
    q = s * s
    p = q * (2 / 13) + 2 / 11
    for k in (9, 7, 5, 3):
        p = p * q + 2 / k
    p = p * q + 2.0
    return lax.max(x, lax.full_like(x, 0.0)) + s * p


def relabel(
    x: jax.Array, axes: tuple[int, ...], source: Any, target: Any, interpret: bool
) -> jax.Array:
    """Transpose without moving data: in the layout ``target`` every value lies where ``source`` has it."""
    if interpret:
        return jnp.transpose(x, axes)
    shape = tuple(x.shape[a] for a in axes)

    def keep(ctx, x):
        del ctx
        layout = target.to_mgpu()
        registers = x.registers.reshape(layout.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=x.is_signed)

    return plgpu.inline_mgpu(
        arg_types=(source,),
        return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=target),
    )(keep)(x)


def lane_sums(
    states: list[jax.Array], layouts: StateLayouts, interpret: bool, tf32: bool = False
) -> jax.Array:
    """Sum over their channels two states for each of some steps: ``(steps, 2, warps, rest)``.

    On the device the lanes halve the list of values at every exchange, so that n values cost n - 1 shuffles and a few
    more, not 5 each. The order of the additions is fixed: the result is deterministic.

    With `tf32`, tensor cores add up quads of lanes, where there are 16 values. They truncate each to 10 bits of
    mantissa.
    """
    shape = (len(states) // 2, 2, states[0].shape[0], states[0].shape[2])
    if interpret:
        return jnp.stack([jnp.sum(state, axis=1) for state in states]).reshape(shape)
    quads = tf32 and len(states) * layouts.rest == 16
    layout = layouts.sums(shape[0], quads)
    return plgpu.inline_mgpu(
        arg_types=(layouts.state,) * len(states),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=layout),
    )(functools.partial(_lane_sums, shape=shape, layout=layout.to_mgpu(), quads=quads))(*states)


def _lane_sums(ctx, *states, shape, layout, quads):
    del ctx
    utils = mgpu.utils
    add = functools.partial(arith.addf, fastmath=arith.FastMathFlags.contract)
    i32 = ir.IntegerType.get_signless(32)

    def items(array):
        total = functools.reduce(add, array.registers.flat)  # blocks one lane holds
        return [
            vector.extract(
                total, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
            )
            for i in range(ir.VectorType(total.type).shape[0])
        ]

    values = [item for state in states for item in items(state)]
    lane = arith.remui(utils.thread_idx(), utils.c(LANES, i32))
    stride = LANES // 2
    if quads:
        values = _quad_sums(values, lane)
    while len(values) > 1:
        half = len(values) // 2
        bit = arith.andi(lane, utils.c(stride, i32))
        upper = arith.cmpi(arith.CmpIPredicate.ne, bit, utils.c(0, i32))
        merged = []
        for low, high in zip(values[:half], values[half:], strict=True):
            keep = arith.select(upper, high, low)
            send = arith.select(upper, low, high)
            merged.append(add(keep, utils.shfl_bfly(send, stride)))
        values = merged
        stride //= 2
    (value,) = values
    while stride > (2 if quads else 0):
        value = add(value, utils.shfl_bfly(value, stride))
        stride //= 2
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    registers.flat[0] = vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), value)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _quad_sums(values: list[Any], lane: Any) -> list[Any]:
    """Add 16 values up over each quad of lanes: lane q of a quad gets the sums of values 4 q to 4 q + 3.

    Four products on the tensor cores, each of four values with a matrix that puts their sums into columns of their own.
    """
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    number = mgpu.utils.c
    zero, one = number(0.0, f32), number(1.0, f32)
    group = arith.divui(lane, number(4, i32))
    column = [
        arith.select(arith.cmpi(arith.CmpIPredicate.eq, group, number(n, i32)), one, zero)
        for n in range(8)
    ]
    totals = [zero] * 4
    result = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
    code = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    for q in range(4):
        operands = [*values[4 * q : 4 * q + 4], *column[2 * q : 2 * q + 2]]
        operands = [arith.bitcast(i32, x) for x in operands]
        sums = llvm.inline_asm(
            result, [*operands, *totals], code, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            has_side_effects=False,
        )  # fmt: skip
        totals = [llvm.extractvalue(f32, sums, [i]) for i in range(4)]
    # A column holds the sums of rows 0 to 7 first, then those of rows 8 to 15.
    return [totals[i] for i in (0, 2, 1, 3)]

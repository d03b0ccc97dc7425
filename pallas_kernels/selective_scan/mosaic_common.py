"""What the forward and the backward Mosaic GPU scan kernels share.

One warpgroup (4 warps of 32 lanes) owns a block of channels of one sequence.  The
state of the block has the logical shape ``(warps, channels, rest)``: the ``n`` states
of a channel are cut into ``warps`` groups, one a warp; a lane owns a channel and
keeps the ``rest`` states of its group in registers, as one vector.  What depends on
the channel alone is then replicated over warps, what depends on the state alone over
lanes, and one shared-memory vector load brings a lane its B (or C) of a step.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
WARPS = 4  # warps of a warpgroup
LANES = 32


def _tiled(tiles, warp_dims, lane_dims, vector_dim):
    layout = mgpu.TiledLayout(
        plgpu.Tiling(tiles), warp_dims, lane_dims, vector_dim, _check_canonical=False
    ).canonicalize()
    return layout, plgpu.Layout.TILED(
        layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    )


def _reduced(layout, axes):
    layout = layout.reduce(axes)
    return plgpu.Layout.TILED(
        layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    )


class StateLayouts:
    """Register layouts of a ``(warps, channels, rest)`` state and of its parts."""

    def __init__(self, warps: int, rest: int):
        across = WARPS // warps  # warps side by side along the channels
        base, self.state = _tiled(
            ((warps, across * LANES, rest), (1, LANES, rest), (1, 1, rest)),
            (-9, -8),
            (-5,),
            -1,
        )
        self.base = base
        self.channel = _reduced(base, (0, 2))  # (channels,)
        self.step = _reduced(base, (1,))  # (warps, rest)
        self.partial = _reduced(base, (2,))  # (warps, channels)
        # (warps, values): one value a lane, the pattern repeated when values < 32.
        values = 2 * rest
        self.values = values
        if values <= LANES and warps == WARPS:
            lanes = (-3,) if values == LANES else (plgpu.Replicated(LANES // values), -3)
            _, self.sums = _tiled(((WARPS, values), (1, 1)), (-4,), lanes, -1)


def tile_layout(rows: int) -> plgpu.Layout:
    """Layout of a ``(rows, channels)`` tile for the elementwise phases."""
    if rows % 16 == 0:  # a lane holds 4 neighbours: 8 lanes a row, 16 rows a register
        tiles = ((16, 32), (4, 32), (1, 4))
    elif rows % 8 == 0:
        tiles = ((8, 32), (2, 32), (1, 2))
    else:
        raise ValueError(f"tile rows must be a multiple of 8, got {rows}")
    return _tiled(tiles, (-6,), (-4, -3), -1)[1]


def tile_channel_layout(rows: int) -> plgpu.Layout:
    """Layout of a ``(channels,)`` vector that broadcasts along a tile's rows."""
    layout = tile_layout(rows).to_mgpu()
    return _reduced(layout, (0,))


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)) to float32 rounding, also where it is tiny.

    With e = exp(-|x|) and s = e / (2 + e) in (0, 1/3], log1p(e) = 2 atanh(s).
    """
    e = lax.exp2(lax.abs(x) * -LOG2E)
    s = e / (e + 2.0)
    q = s * s
    p = q * (1 / 15) + 1 / 13
    for k in (11, 9, 7, 5, 3):
        p = p * q + 1 / k
    p = p * q + 1.0
    return lax.max(x, lax.full_like(x, 0.0)) + (s + s) * p


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), with no overflow for large |x|."""
    e = lax.exp2(lax.abs(x) * -LOG2E)
    r = 1.0 / (e + 1.0)
    return jnp.where(x >= 0.0, r, e * r)


def lane_sums(first: jax.Array, second: jax.Array, layouts: StateLayouts, interpret: bool):
    """Sums of two states over their channels: ``(warps, 2 * rest)``.

    On the device the lanes halve the list of values at every exchange, so that
    2·rest values cost 2·rest − 1 shuffles and a few more, not 5 each.  The order of
    the additions is fixed: the result is deterministic.
    """
    if interpret:
        return jnp.concatenate([jnp.sum(first, axis=1), jnp.sum(second, axis=1)], axis=1)
    warps, _, rest = first.shape
    return plgpu.inline_mgpu(
        arg_types=(layouts.state, layouts.state),
        return_type=plgpu.ShapeDtypeStruct((warps, 2 * rest), jnp.float32, layout=layouts.sums),
    )(functools.partial(_lane_sums, out_layout=layouts.sums.to_mgpu()))(first, second)


def _lane_sums(ctx, first, second, *, out_layout):
    del ctx
    import numpy as np
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, vector

    utils = mgpu.utils
    i32 = ir.IntegerType.get_signless(32)
    f32 = ir.F32Type.get()
    add = lambda a, b: arith.addf(a, b)  # noqa: E731

    def items(array):
        total = None
        for reg in array.registers.flat:  # blocks of channels that one lane holds
            total = reg if total is None else add(total, reg)
        count = ir.VectorType(total.type).shape[0]
        return [
            vector.extract(
                total, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
            )
            for i in range(count)
        ]

    values = items(first) + items(second)
    lane = arith.remui(utils.thread_idx(), utils.c(LANES, i32))
    stride = len(values) // 2
    while stride:
        bit = arith.andi(lane, utils.c(stride, i32))
        upper = arith.cmpi(arith.CmpIPredicate.ne, bit, utils.c(0, i32))
        merged = []
        for low, high in zip(values[:stride], values[stride:], strict=True):
            keep = arith.select(upper, high, low)
            send = arith.select(upper, low, high)
            merged.append(add(keep, utils.shfl_bfly(send, stride)))
        values = merged
        stride //= 2
    (value,) = values
    stride = len(items(first)) * 2
    while stride < LANES:
        value = add(value, utils.shfl_bfly(value, stride))
        stride *= 2
    reg = vector.broadcast(ir.VectorType.get((1,), f32), value)
    registers = np.empty(out_layout.registers_shape((WARPS, 2 * len(items(first)))), dtype=object)
    registers.flat[0] = reg
    return mgpu.FragmentedArray(_registers=registers, _layout=out_layout, _is_signed=None)


def compiler_params() -> plgpu.CompilerParams:
    """Fast exponentials; barriers are written by hand where tiles change hands."""
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )


def interpret_params(interpret: bool):
    return plgpu.InterpretGPUParams() if interpret else None

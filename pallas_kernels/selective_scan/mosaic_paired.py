"""Another share of a warp's work, for the gradient kernel: a lane owns two neighbouring channels and two states.

Sums over channels then start within the lane and end after 16 lanes, with half the values to exchange: 5
shuffles a step instead of 9. Sums over states need eight parts added up afterwards instead of four.

The logical state is ``(groups, channels, 2)``, a warp's four states cut into two groups; memory keeps its
``(warps, rest)`` of (4, 4). Two channels move as one vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_common import (
    WARPS,
    _lane_sums,
    _reduced,
    _tiled,
    store,
)
from pallas_kernels.selective_scan.mosaic_forward import Plan, StepReader

GROUPS = 2 * WARPS


class _Layouts:
    """Of the ``(groups, channels, 2)`` state and its parts, and of the same values as memory has them."""

    def __init__(self) -> None:
        copies = plgpu.Replicated
        base, self.state = _tiled(((8, 32, 2), (2, 32, 2), (1, 2, 2)), (-9,), (-6, -5), -1)
        self.channel = _reduced(base, (0, 2))
        self.step = _reduced(base, (1,))
        self.partial = _reduced(base, (2,))

        def memory(tiles, warp_dims, lane_dims):
            return _tiled(tiles, warp_dims, lane_dims, -1)[1]

        self.state_memory = memory(((32, 4, 4), (32, 1, 4), (2, 1, 2)), (-8,), (-4, -6))
        self.channel_memory = memory(((32,), (2,)), (copies(4),), (copies(2), -2))
        self.step_memory = memory(((4, 4), (1, 4), (1, 2)), (-6,), (-3, copies(16)))
        self.partial_memory = memory(((8, 32), (2, 32), (1, 2)), (-6,), (-4, -3))
        self.sums_memory = memory(
            ((2, 4, 4), (2, 1, 4), (1, 1, 2), (1, 1, 1)), (-11,), (-7, -9, -4, copies(4))
        )


def regroup(
    x: jax.Array,
    change: Callable[[jax.Array], jax.Array],
    source: Any,
    target: Any,
    interpret: bool,
) -> jax.Array:
    """``change(x)``, a new arrangement of the same values, which every lane keeps in the same order."""
    if interpret:
        return change(x)
    shape = jax.eval_shape(change, jax.ShapeDtypeStruct(x.shape, x.dtype)).shape
    return plgpu.inline_mgpu(
        arg_types=(source,),
        return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=target),
    )(functools.partial(_regroup, shape=shape, target=target.to_mgpu()))(x)


def _regroup(ctx: Any, x: mgpu.FragmentedArray, *, shape: Any, target: Any) -> mgpu.FragmentedArray:
    del ctx
    registers = np.empty(target.registers_shape(shape), dtype=object)
    at = lambda i: ir.DenseI64ArrayAttr.get([i])  # noqa: E731
    values = [
        vector.extract(register, dynamic_position=[], static_position=at(i))
        for register in x.registers.flat
        for i in range(ir.VectorType(register.type).shape[0])
    ]
    size = len(values) // registers.size
    for number in range(registers.size):
        register = llvm.mlir_undef(ir.VectorType.get((size,), values[0].type))
        for i, value in enumerate(values[number * size : (number + 1) * size]):
            register = vector.insert(value, register, dynamic_position=[], static_position=at(i))
        registers.flat[number] = register
    return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=x.is_signed)


class PairedReader(StepReader):
    """See `StepReader`: the same, in this arrangement."""

    groups = GROUPS

    def __init__(self, plan: Plan, interpret: bool):
        self.plan, self.layouts, self.interpret = plan, _Layouts(), interpret
        self.shape = (GROUPS, plan.channels, 2)

    def channel(self, ref: Any) -> jax.Array:
        layouts = self.layouts
        pairs = plgpu.load(ref, layout=layouts.channel_memory, optimized=False)
        return regroup(pairs, lambda x: x, layouts.channel_memory, layouts.channel, self.interpret)

    def coefficients(self, ref: Any) -> jax.Array:
        layouts = self.layouts
        row = plgpu.load(ref, layout=layouts.step_memory, optimized=False)
        row = regroup(
            row, lambda x: x.reshape(GROUPS, 2), layouts.step_memory, layouts.step, self.interpret
        )
        spread = lax.broadcast_in_dim(row, self.shape, (0, 2))
        return plgpu.layout_cast(spread, layouts.state)

    def state(self, ref: Any) -> jax.Array:
        layouts = self.layouts
        stored = plgpu.load(ref, layout=layouts.state_memory, optimized=False)

        def change(x):
            return x.reshape(x.shape[0], GROUPS, 2).transpose(1, 0, 2)

        return regroup(stored, change, layouts.state_memory, layouts.state, self.interpret)

    def to_store(self, state: jax.Array) -> jax.Array:
        layouts = self.layouts

        def change(x):
            return x.transpose(1, 0, 2).reshape(x.shape[1], WARPS, 4)

        return regroup(state, change, layouts.state, layouts.state_memory, self.interpret)

    def store_share(self, ref: Any, terms: jax.Array) -> None:
        layouts = self.layouts
        share = jnp.sum(terms, axis=2)
        pairs = regroup(share, lambda x: x, layouts.partial, layouts.partial_memory, self.interpret)
        store(ref, pairs)

    def channel_sums(self, first: jax.Array, second: jax.Array) -> jax.Array:
        if self.interpret:
            return jnp.stack([first.sum(1), second.sum(1)]).reshape(2, WARPS, 4)
        layouts, shape = self.layouts, (2, WARPS, 4)
        layout = layouts.sums_memory
        return plgpu.inline_mgpu(
            arg_types=(layouts.state, layouts.state),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=layout),
        )(functools.partial(_lane_sums, shape=shape, layout=layout.to_mgpu(), lanes=16))(
            first, second
        )

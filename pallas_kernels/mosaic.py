"""What all Mosaic GPU kernels share: the device's sizes, register layouts, fast arithmetic, parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir.dialects import llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
WARPS = 4  # warps of a warpgroup
LANES = 32
PROCESSORS = 132  # of an H100
SHARED_MEMORY = 227 * 1024  # bytes that an H100's processor can give to blocks


def tiled(tiles, warp_dims, lane_dims, vector_dim) -> tuple[Any, Any]:
    """Build a register layout. Return it as Mosaic's own type and as the public one that kernels take."""
    layout = mgpu.TiledLayout(
        plgpu.Tiling(tiles), warp_dims, lane_dims, vector_dim, _check_canonical=False
    ).canonicalize()
    return layout, _public(layout)


def reduced(layout: Any, axes: tuple[int, ...]) -> Any:
    """Return the public layout of a value of `layout` after a sum over `axes`."""
    return _public(layout.reduce(axes))


def _public(layout: Any) -> Any:
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def reciprocal(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """Compute 1 / x to about one rounding, in one instruction."""
    if interpret:
        return 1.0 / x
    return plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout),
    )(_reciprocal)(x)


def _reciprocal(ctx: Any, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    del ctx

    def one(value):
        return llvm.inline_asm(value.type, [value], "rcp.approx.ftz.f32 $0, $1;", "=f,f")

    return x._pointwise(x._lift_fast_instr(one))


def sigmoid(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """Compute 1 / (1 + exp(-x)) without overflow for large |x|."""
    e = lax.exp2(lax.abs(x) * -LOG2E)
    r = reciprocal(e + 1.0, layout, interpret)
    return jnp.where(x >= 0.0, r, e * r)


def store(ref: Any, value: jax.Array) -> None:
    """Write to shared or global memory in whatever pattern the layout gives."""
    if hasattr(plgpu, "store"):  # from JAX 0.12 on; plain assignment then insists on good patterns
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def compiler_params() -> plgpu.CompilerParams:
    """Ask for fast exponentials and no automatic barriers: kernels place them where tiles change hands."""
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )


def interpret_params(interpret: bool) -> Any:
    """Return the CPU interpreter's parameters (it looks for races in shared memory), or None on a device."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None

"""Share among all Mosaic GPU kernels: sizes of the device, register layouts, fast arithmetic, compiler parameters."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
WARPS = 4  # warps of a warpgroup
LANES = 32
PROCESSORS = 132  # multiprocessors of an H100
SHARED_MEMORY = 227 * 1024  # bytes that a multiprocessor of an H100 can give to thread blocks


def tiled(tiles, warp_dims, lane_dims, vector_dim) -> tuple[Any, Any]:
    """Build a register layout. Return it as Mosaic's internal type and as the public type that kernels take."""
    layout = mgpu.TiledLayout(
        plgpu.Tiling(tiles), warp_dims, lane_dims, vector_dim, _check_canonical=False
    ).canonicalize()
    return layout, _public(layout)


def reduced(layout: Any, axes: tuple[int, ...]) -> Any:
    """Return the public layout of a value of `layout` after a sum over `axes`."""
    return _public(layout.reduce(axes))


def _public(layout: Any) -> Any:
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _apply(instruction: str, x: jax.Array, layout: Any) -> jax.Array:
    """Apply a PTX instruction, which reads float32 register $1 and writes float32 register $0, to each value."""

    def one(value):
        return llvm.inline_asm(value.type, [value], instruction, "=f,f")

    def each(ctx: Any, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        del ctx
        return x._pointwise(x._lift_fast_instr(one))

    return plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout),
    )(each)(x)


def _pairs(value: ir.Value) -> list[ir.Value]:
    """Return the pairs of 16-bit numbers of a vector, each as an int32 register with the first number below."""
    i32 = ir.IntegerType.get_signless(32)
    count = ir.VectorType(value.type).shape[0] // 2
    words = vector.bitcast(ir.VectorType.get((count,), i32), value)
    return [vector.extract(words, [], [i]) for i in range(count)]


def _mapped(convert: Callable[[ir.Value], ir.Value], x: jax.Array, dtype: Any, layout: Any):
    """Convert every register of a value of `layout` to a vector of `dtype`."""

    def each(ctx: Any, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        del ctx
        registers = np.empty(x.registers.shape, dtype=object)
        for at, register in np.ndenumerate(x.registers):
            registers[at] = convert(register)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), layout=layout),
    )(each)(x)


def widened(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """Convert to float32; of bfloat16, whose layout has pairs in a register, in one instruction a number."""
    if interpret or x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)

    def convert(register: ir.Value) -> ir.Value:
        f32, parts = ir.F32Type.get(), []
        i32 = ir.IntegerType.get_signless(32)
        for word in _pairs(register):
            low = arith.shli(word, mgpu.c(16, i32))
            high = arith.andi(word, mgpu.c(-65536, i32))
            parts += [arith.bitcast(f32, half) for half in (low, high)]
        return vector.from_elements(ir.VectorType.get((len(parts),), f32), parts)

    return _mapped(convert, x, jnp.float32, layout)


def narrowed(x: jax.Array, dtype: Any, layout: Any, interpret: bool) -> jax.Array:
    """Round float32 to `dtype`; to bfloat16, where a register of the layout has pairs, two numbers an instruction."""
    if interpret or jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)

    def convert(register: ir.Value) -> ir.Value:
        i32, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        count = ir.VectorType(register.type).shape[0]
        numbers = [vector.extract(register, [], [i]) for i in range(count)]
        words = [
            llvm.inline_asm(i32, [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
            for low, high in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        packed = vector.from_elements(ir.VectorType.get((count // 2,), i32), words)
        return vector.bitcast(ir.VectorType.get((count,), bf16), packed)

    return _mapped(convert, x, dtype, layout)


def reciprocal(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """Compute 1 / x in one instruction, with an error of about one rounding."""
    return 1.0 / x if interpret else _apply("rcp.approx.ftz.f32 $0, $1;", x, layout)


def tf32(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """Round to the 10 bits of mantissa that TF32 products read. They would truncate the other bits."""
    if interpret:
        return lax.reduce_precision(x, 8, 10)
    # The result is an integer register to the assembler, so it passes as a float through a move.
    return _apply("{ .reg .b32 t; cvt.rna.tf32.f32 t, $1; mov.b32 $0, t; }", x, layout)


def sigmoid(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """Compute 1 / (1 + exp(-x)) without overflow for large |x|."""
    e = lax.exp2(lax.abs(x) * -LOG2E)
    r = reciprocal(e + 1.0, layout, interpret)
    return jnp.where(x >= 0.0, r, e * r)


def warp_index() -> jax.Array:
    """Return the index of this warp in its warpgroup. Unlike other scalars, it differs between warps.

    So a load whose offset depends on it gives each warp another vector. If a layout spreads an axis over the warps, and
    the vector is broadcast along this axis, each warp holds another row. The interpreter has no warps.
    """

    @plgpu.inline_mgpu(
        return_type=plgpu.ShapeDtypeStruct((), jnp.dtype("int32"), layout=plgpu.Layout.WG_SPLAT())
    )
    def number(ctx: Any) -> mgpu.FragmentedArray:
        del ctx
        count = mgpu.c(WARPS, ir.IntegerType.get_signless(32))
        return mgpu.FragmentedArray.splat(
            arith.remui(mgpu.warp_idx(sync=True), count), (), is_signed=True
        )

    return number()


def store(ref: Any, value: jax.Array) -> None:
    """Write to shared or global memory with any access pattern that the layout gives."""
    if hasattr(plgpu, "store"):
        # From JAX 0.12 on. Plain assignment refuses inefficient patterns there.
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


def gpu_kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """Build a Mosaic GPU kernel whose body is traced in 32-bit mode.

    With `jax_enable_x64`, loops would count in int64 and Mosaic's indices of thread blocks in int32.

    Args:
        body: function of the kernel's references, as for `plgpu.kernel`.
        options: arguments of `plgpu.kernel`; `compiler_params` defaults to `compiler_params()`.
    """

    def narrow(*refs: Any) -> None:
        with jax.enable_x64(False):  # `jax.vmap` traces the body again, after `call` has returned.
            body(*refs)

    run = plgpu.kernel(narrow, **{"compiler_params": compiler_params(), **options})

    def call(*arrays: Any) -> Any:
        with jax.enable_x64(False):
            return run(*arrays)

    return call


def interpret_params(interpret: bool, warpgroups: int = 1) -> Any:
    """Return the CPU interpreter's parameters (it looks for races in shared memory), or None on a device.

    Raises:
        NotImplementedError: XLA has too few threads to interpret `warpgroups` warpgroups that wait for each other.
    """
    if not interpret:
        return None
    # Each warpgroup blocks a thread while it waits, and the call that started them blocks one more.
    threads = int(os.environ.get("PJRT_NPROC", os.cpu_count() or 1))
    if 1 < warpgroups >= threads:
        raise NotImplementedError(
            f"The interpreter could wait forever: {warpgroups} warpgroups need {warpgroups + 1} threads of XLA, which "
            f"has {threads}. Set the environment variable PJRT_NPROC before JAX starts."
        )
    return plgpu.InterpretGPUParams(detect_races=True)

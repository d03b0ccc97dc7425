"""Products in half precision that lose little: tokens enter as two numbers, results are wide.

A token rounded once to bfloat16 (8 bits of mantissa) was measured to move gradients of four-block Vim and FastVim
models by up to a quarter of their largest entries, since Δ, B and C act through exponentials. Written as the sum of
two bfloat16 numbers it keeps 16 bits, for one more product in the forward pass and none in the backward one.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastvim_jax.precision import Precision
from pallas_kernels.dtypes import wide_dtype


def linear(
    layer: nnx.Linear, x: Float[Array, "*rows i"], precision: Precision
) -> Float[Array, "*rows o"]:
    """Apply a linear layer through `product`; the result, bias included, is float32 or wider.

    With activations="compute" it is a plain product of and in the compute dtype.

    Args:
        layer: Holds `kernel` `i o` and perhaps `bias` `o`; its own dtype is not used.
        x: Any float dtype.
        precision: Gives the operands' dtype (`compute`) and how float32 products are carried out.
    """
    if precision.activations == "compute":
        operands = (a.astype(precision.compute) for a in (x, layer.kernel[...]))
        y = jnp.matmul(*operands, precision=precision.lax)
    else:
        y = product(x, layer.kernel[...], precision.compute, precision.lax)
    return y if layer.bias is None else y + layer.bias[...].astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
    x: Float[Array, "*rows i"],
    kernel: Float[Array, "i o"],
    operands: jnp.dtype,
    precision: jax.lax.Precision,
) -> Float[Array, "*rows o"]:
    """x @ kernel, with operands of dtype `operands` and sums and result in float32 or wider.

    The kernel is rounded to `operands`; x, where it is wider, becomes the sum of two arrays of that dtype. The
    backward pass has one product for each gradient, with operands rounded once and a result that is not: with JAX's
    own rule the incoming gradient would stay wide and make slow, wide products of both.
    """
    return _forward(x, kernel, operands, precision)[0]


def _forward(x, kernel, operands, precision):
    rounded = kernel.astype(operands)
    terms = _terms(x, operands)
    # One product over both terms, so that its wide result is written once.
    y = _contract(
        jnp.concatenate(terms, -1), jnp.concatenate([rounded] * len(terms)), precision, 1, 0
    )
    dtypes = jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype)
    return y, (terms[0], rounded, *dtypes)


def _backward(operands, precision, saved, gradient):
    x, kernel, like_x, like_kernel = saved
    gradient = gradient.astype(operands)
    to_x = _contract(gradient, kernel, precision, 1, 1)
    rows = [jax.lax.collapse(a, 0, a.ndim - 1) for a in (x, gradient)]
    to_kernel = _contract(rows[0], rows[1], precision, 0, 0)
    return to_x.astype(like_x.dtype), to_kernel.astype(like_kernel.dtype)


def _terms(x, dtype):
    """Arrays of `dtype` whose sum is x: x rounded and, where x is wider, what that leaves."""
    if wide_dtype(x.dtype, dtype) == dtype or x.dtype == dtype:
        return [x.astype(dtype)]
    # Not a cast there and back, which XLA may leave out.
    info = jnp.finfo(dtype)
    first = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return [first.astype(dtype), (x - first).astype(dtype)]


def _contract(a, b, precision, axis_a, axis_b):
    """Sum over the last axis of a (its first where `axis_a` is 0) and axis `axis_b` of b, in float32 or wider."""
    axis_a = a.ndim - 1 if axis_a else 0
    wide = wide_dtype(a.dtype)
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=wide)


product.defvjp(_forward, _backward)

"""Multiply tokens with weights in half precision and lose little: split each token into two bfloat16 terms.

Δ, B and C act through exponentials, so rounding the tokens once to bfloat16 (8 bits of mantissa) is too coarse: it was
measured to change gradients of four-block Vim and FastVim models by up to a quarter of their largest entries. The sum
of two bfloat16 numbers keeps 16 bits. It costs one more product in the forward pass and none in the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastvim_jax.precision import Precision
from pallas_kernels.derivatives import reverse_mode_only
from pallas_kernels.dtypes import wide_dtype
from pallas_kernels.sharding import cast_parameter, mark_varying


def linear(
    layer: nnx.Linear,
    x: Float[Array, "*rows i"],
    precision: Precision,
    columns: slice | None = None,
    *,
    biased: bool = True,
) -> Float[Array, "*rows o"]:
    """Apply a linear layer through `product`. The result, bias included, is float32 or wider.

    With activations="compute", multiply plainly instead: operands and result have the compute dtype.

    Args:
        layer: Holds `kernel` `i o` and, optionally, `bias` `o`. The layer's own `dtype` is ignored.
        x: Any float dtype.
        precision: Gives the dtype of the operands (`compute`) and XLA's precision for float32 products (`lax`).
        columns: Which of the layer's outputs to compute, by default all.
        biased: Whether to add the layer's bias, if it has one.
    """
    kernel = layer.kernel[...]
    bias = None if layer.bias is None or not biased else layer.bias[...]
    if columns is not None:
        kernel, bias = kernel[:, columns], None if bias is None else bias[columns]
    if precision.activations == "compute":
        kernel = cast_parameter(kernel, precision.compute, x)
        y = jnp.matmul(x.astype(precision.compute), kernel, precision=precision.lax)
    else:
        y = product(x, kernel, precision.compute, precision.lax)
    return y if bias is None else y + cast_parameter(bias, y.dtype, y)


def promote_parameters(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Cast a layer's input, the first of `arrays`, and its parameters to `dtype` through `cast_parameter`.

    Pass it as `promote_dtype` to a layer of Flax that is called by itself, such as `nnx.Conv`.
    """
    del inexact
    x, *parameters = arrays
    return x.astype(dtype), *(
        None if p is None else cast_parameter(p, dtype, x) for p in parameters
    )


def product(
    x: Float[Array, "*rows i"],
    kernel: Float[Array, "i o"],
    operands: jnp.dtype,
    precision: jax.lax.Precision,
) -> Float[Array, "*rows o"]:
    """Compute x @ kernel with operands of dtype `operands`; accumulate and return float32 or wider.

    The kernel is rounded to `operands`. If x is wider, it is split into two terms of that dtype. The backward pass does
    one product per gradient: it rounds both operands and keeps the result wide. JAX's own rule would keep the incoming
    gradient wide instead, so both products would be wide and slow.
    """
    with reverse_mode_only("models", "fastvim_jax.jvp"):
        return _product(x, mark_varying(kernel, x), operands, precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, kernel, operands, precision):
    return _forward(x, kernel, operands, precision)[0]


def _forward(x, kernel, operands, precision):
    rounded = kernel.astype(operands)
    terms = _terms(x, operands)
    # Multiply both terms in one product, so that the wide result is written once.
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
    """Split x into arrays of `dtype` that sum to x: x rounded and, if x is wider, the rounding error."""
    if wide_dtype(x.dtype, dtype) == dtype or x.dtype == dtype:
        return [x.astype(dtype)]
    # Round with reduce_precision: XLA may remove a cast to `dtype` and back.
    info = jnp.finfo(dtype)
    first = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return [first.astype(dtype), (x - first).astype(dtype)]


def _contract(a, b, precision, axis_a, axis_b):
    """Contract the last axis of `a` (the first if `axis_a` is 0) with axis `axis_b` of `b`, in float32 or wider."""
    axis_a = a.ndim - 1 if axis_a else 0
    wide = wide_dtype(a.dtype)
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=wide)


_product.defvjp(_forward, _backward)

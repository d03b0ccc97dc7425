"""Powers of two of float32 numbers in 15 operations that CPUs have for whole vectors."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LOG2E = 1 / math.log(2)
"""exp(x) = exp2(LOG2E x)"""
_COEFFICIENTS = (
    0.6931472029,
    0.2402264791,
    0.05550332471,
    0.009618437358,
    0.001339887441,
    0.0001535336191,
)
"""2^r = 1 + c0 r + c1 r² + ... for |r| up to 1/2, with a relative error of 2e-9: a fit to the largest error."""
_RANGE = -126.0, 127.99999
"""Between these, 2^t is a normal number of float32."""
_WHOLE = 1.5 * 2.0**23
"""The sum of this and a whole number n, read as an integer, has n in its lowest bits."""


@jax.custom_jvp
def exp2(t: jax.Array) -> jax.Array:
    """Compute 2^t in t's dtype; of float32 numbers on a CPU without a call of XLA's exponential.

    n = round(t);   2^t = 2^n 2^(t - n), a power of two times a polynomial

    With XLA's exponential in a scan's steps, FastVim-T takes 4 to 6 % more time on a CPU with AVX-512
    (benchmarks/NOTES.md, "Forward passes on a CPU"). The relative error is below two rounding errors where 2^t is
    a normal number. Beyond, on a CPU, results are the smallest and the largest normal number.
    """
    if t.dtype != jnp.float32:
        return jnp.exp2(t)
    return jax.lax.platform_dependent(t, cpu=_by_polynomial, default=jnp.exp2)


def _by_polynomial(t: jax.Array) -> jax.Array:
    t = jnp.clip(t, *_RANGE)
    whole = jnp.round(t)
    rest = t - whole
    power = jnp.full_like(rest, _COEFFICIENTS[-1])
    for coefficient in (*_COEFFICIENTS[-2::-1], 1.0):
        power = power * rest + coefficient
    # Add n to the exponent of the power.
    shifted = jax.lax.bitcast_convert_type(whole + _WHOLE, jnp.int32) << 23
    bits = jax.lax.bitcast_convert_type(power, jnp.int32) + shifted
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@exp2.defjvp
def _jvp(primals, tangents):
    (t,), (tangent,) = primals, tangents
    y = exp2(t)
    return y, tangent * (y * math.log(2))

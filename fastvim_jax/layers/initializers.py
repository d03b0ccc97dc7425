"""Define initial values of the parameters, with the distributions of the authors' implementation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer


def symmetric_uniform(bound: float) -> Initializer:
    """Draw uniformly from ±`bound`."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def fan_in_uniform(fan_in: int, scale: float = 1.0) -> Initializer:
    """Draw uniformly from ±scale/sqrt(fan_in)."""
    return symmetric_uniform(scale / math.sqrt(fan_in))


def truncated_normal(std: float, bound: float) -> Initializer:
    """Build a normal initialiser of standard deviation `std` before it is cut at ±`bound`, in the parameter's units."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        cut = bound / std
        return std * jax.random.truncated_normal(key, -cut, cut, shape, dtype)

    return init


def step_bias(low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Initializer:
    """Draw steps log-uniformly from [low, high], floor them, and invert softplus (Mamba's initial bias of dt)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        log_step = jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))
        step = jnp.maximum(jnp.exp(log_step), floor)
        return step + jnp.log(-jnp.expm1(-step))

    return init


def log_range(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Return log(1..n) along the last axis: the S4D-real initialisation of A_log."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)

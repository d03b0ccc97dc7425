"""Choose the dtype that sums and states are computed in: float32 at least, because half precision loses small terms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def wide_dtype(*given: Any) -> jnp.dtype:
    """Return float32, or the widest of the dtypes (or arrays) given; also under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *given)

"""Define what the embedding of patches computes, by XLA."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dtypes import wide_dtype


def embed(
    images: Float[Array, "b h w c"],
    weight: Float[Array, "p q c d"],
    table: Float[Array, "rows columns d"],
    *,
    stream: Any,
    eps: float,
) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
    """Compute `embed_patches`; the sums are float32 or wider."""
    p, q = weight.shape[:2]
    patches = rearrange(images, "b (r p) (k q) c -> b (r k) (p q c)", p=p, q=q)
    matrix = rearrange(weight, "p q c d -> (p q c) d").astype(images.dtype)
    wide = wide_dtype(images.dtype)
    tokens = jnp.matmul(patches, matrix, preferred_element_type=wide)
    tokens = (tokens + table.reshape(-1, table.shape[-1]).astype(wide)).astype(stream)
    return tokens, normalised(tokens, eps).astype(images.dtype)


def normalised(tokens: Float[Array, "b l d"], eps: float) -> Float[Array, "b l d"]:
    """Apply an RMSNorm without a scale, in float32 or wider."""
    tokens = tokens.astype(wide_dtype(tokens.dtype))
    return tokens * lax.rsqrt(jnp.mean(tokens * tokens, axis=-1, keepdims=True) + eps)

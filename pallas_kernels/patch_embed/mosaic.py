"""Run the Mosaic GPU kernel behind the interface of `xla`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.patch_embed import mosaic_embed, xla
from pallas_kernels.patch_embed.mosaic_embed import Work


def unsupported(images: Any, weight: Any, stream: Any) -> str | None:
    """Return why the kernel cannot embed such images, or None. Of arrays only shape and dtype matter."""
    if images.dtype not in (jnp.bfloat16, jnp.float16):
        return f"images of {jnp.dtype(images.dtype).name}"
    if jnp.dtype(stream) not in (images.dtype, jnp.float32):
        return f"tokens of {jnp.dtype(stream).name}"
    return _work(images.shape, weight.shape).unsupported()


def embed(images, weight, table, *, stream, eps):
    """Compute `xla.embed`: all of it, or, for models wider than a thread block, the tokens; by XLA if neither fits."""
    if unsupported(images, weight, stream) is not None:
        return xla.embed(images, weight, table, stream=stream, eps=eps)
    out = mosaic_embed.embed(
        images, weight.reshape(-1, weight.shape[-1]).astype(images.dtype),
        table.astype(jnp.float32), _work(images.shape, weight.shape),
        stream=jnp.dtype(stream), eps=eps, interpret=gpu.interpreted(),
    )  # fmt: skip
    tokens, *normed = gpu.run_once(tuple(out))
    return tokens, normed[0] if normed else xla.normalised(tokens, eps).astype(images.dtype)


def _work(images: tuple[int, ...], weight: tuple[int, ...]) -> Work:
    p, q, channels, outputs = weight
    return Work(images[0], images[1] // p, images[2] // q, p, q * channels, outputs)

"""Define `embed_patches`: from images to the residual stream and the input of the first block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.checks import as_floats, expect_shape, float_dtype
from pallas_kernels.derivatives import differentiated_as
from pallas_kernels.patch_embed import xla
from pallas_kernels.sharding import on_cuda, per_shard

IMPLEMENTATIONS = ("auto", "pallas", "xla")


def embed_patches(
    images: Float[Array, "b h w c"],
    weight: Float[Array, "p q c d"],
    table: Float[Array, "rows columns d"],
    *,
    stream: Any = "float32",
    eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
    """Cut images into patches, project them, add their positions, and normalise the tokens for the first block.

        tokens = patches · weight + table                           rounded to `stream`
        normed = tokens / sqrt(mean over d of tokens² + eps)

    On Hopper GPUs, and only there, one kernel computes both lines where `embed_patches_unsupported` returns None for a
    device's share of the batch; with more than 192 channels XLA computes the second line. The gradient is XLA's.

    Args:
        images: in half precision for the kernel; h and w are whole patches.
        weight: of patches `p q`; rounded to the dtype of `images`.
        table: positions and bias, read in float32 or wider.
        stream: dtype of the tokens. The norm reads the rounded tokens.
        eps: epsilon of the norm, which has no scale.
        implementation: "pallas" (the kernel), "xla", or "auto": the kernel if the program is lowered for a Hopper GPU,
            otherwise XLA.

    Returns:
        The tokens in the dtype `stream`, row by row, and the normalised ones in the dtype of `images`.

    Raises:
        ValueError: shapes do not fit, an array is not of floats, or implementation is unknown.
        NotImplementedError: implementation is "pallas", but the kernel cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"embed_patches: implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}"
        )
    images = as_floats("embed_patches", "images", images, "b h w c")
    weight = as_floats("embed_patches", "weight", weight, "p q c d")
    table = as_floats("embed_patches", "table", table, "rows columns d")
    (_, height, width, channels), (p, q, *_, outputs) = images.shape, weight.shape
    beside = f"images {images.shape} (b h w c)"
    expect_shape("embed_patches", "weight", weight, "p q c d", (p, q, channels, outputs), beside)
    if not p * q or height % p or width % q:
        raise ValueError(f"embed_patches: {beside} must hold whole patches of {p} x {q} pixels")
    grid = (height // p, width // q, outputs)
    expect_shape("embed_patches", "table", table, "rows columns d", grid, beside)
    options: dict[str, Any] = {
        "stream": float_dtype("embed_patches", "stream", stream),
        "eps": float(eps),
    }
    step_by_step: Callable = functools.partial(xla.embed, **options)

    def reason():
        return _unsupported(images, weight, options["stream"])

    if not gpu.choose(implementation, "embed_patches", reason):
        return step_by_step(images, weight, table)
    run = functools.partial(_on_shares, implementation == "pallas", options)
    return differentiated_as(step_by_step, run, images, weight, table)


def embed_patches_unsupported(images: Any, weight: Any, *, stream: Any) -> str | None:
    """Return why no kernel computes `embed_patches` here, or None.

    Args:
        images, weight, stream: see `embed_patches`. Of arrays only shape and dtype matter.
    """
    return gpu.kernels_missing() or _unsupported(images, weight, stream)


def _unsupported(images, weight, stream) -> str | None:
    from pallas_kernels.patch_embed import mosaic

    return gpu.wgmma_missing() or mosaic.unsupported(images, weight, stream)


def _on_shares(always: bool, options: dict[str, Any], *arrays):
    """Run on each device's share of the batch: the kernel if the program is lowered for CUDA, otherwise XLA."""
    from pallas_kernels.patch_embed import mosaic

    kernel: Callable = functools.partial(mosaic.embed, **options)
    other: Callable = functools.partial(xla.embed, **options)

    def on_share(_, *arrays):
        return kernel(*arrays) if always else on_cuda(kernel, other, *arrays)

    operands, tokens = ("b h w c", "p q c d", "r k d"), "b l d"
    return per_shard(on_share, operands, (tokens, tokens), split="b", opaque=True)(*arrays)

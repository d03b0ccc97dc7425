"""The Vision Transformer (the DeiT architecture), and its pooled attention.

    x += attention(norm1(x));  x += mlp(norm2(x))

Pooled attention takes queries, keys and values from the row means of the normed tokens, attends over rows, repeats
the result along each row and projects it; odd blocks do so on the transposed grid. The class token is a row of its
own. With a convolution, the normed tokens first pass a depthwise causal convolution with SiLU, pooled or not.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tests.oracle.mixer import subset
from tests.oracle.ops import Array, causal_conv1d, gelu, layer_norm, linear, silu, softmax
from tests.oracle.pooling import pool, rows_of, transpose_order, unpool
from tests.oracle.vision_mamba import (
    drop_path_rates,
    is_transposed,
    pair,
    patch_embed,
    patch_grid,
    position_table,
)


def attention(params: dict[str, Array], x: Array, heads: int) -> Array:
    """Compute multi-head attention of (b, l, d) with itself, before the output projection."""
    batch, length, width = x.shape
    qkv = linear(params, "qkv", x).reshape(batch, length, 3, heads, width // heads)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    logits = np.einsum("bqhc,bkhc->bhqk", query, key) * (width // heads) ** -0.5
    return np.einsum("bhqk,bkhc->bqhc", softmax(logits), value).reshape(batch, length, width)


def convolve(params: dict[str, Array], config: SimpleNamespace, x: Array) -> Array:
    """Apply the depthwise causal convolution with SiLU, where the model has one."""
    if not config.conv_width:
        return x
    return silu(causal_conv1d(x, params["conv.kernel"], params.get("conv.bias")))


def pooled_attention(
    params: dict[str, Array], config: SimpleNamespace, x: Array, block: int, grid: tuple[int, int]
) -> Array:
    """Compute attention over the rows of the grid, or of the transposed grid, with the class token first."""
    transposed = is_transposed(config, block)
    order = transpose_order(grid, 0) if transposed else np.arange(x.shape[1])
    steps = rows_of(grid[::-1] if transposed else grid, 0)
    rows = pool(convolve(params, config, x[:, order]), steps, "mean", class_at=0)
    mixed = unpool(attention(params, rows, config.num_heads), steps)
    return mixed[:, np.argsort(order)]


def vit_block(params: dict[str, Array], config: SimpleNamespace, x: Array) -> Array:
    """Run one block without pooling: (b, l, d) -> (b, l, d)."""
    eps, inner = config.norm_eps, subset(params, "attn")
    normed = layer_norm(x, params["norm1.scale"], params["norm1.bias"], eps)
    x = x + linear(inner, "proj", attention(inner, normed, config.num_heads))
    normed = layer_norm(x, params["norm2.scale"], params["norm2.bias"], eps)
    return x + linear(params, "mlp.fc2", gelu(linear(params, "mlp.fc1", normed)))


def vit(
    params: dict[str, Array],
    config: SimpleNamespace,
    images: Array,
    *,
    drop_path_keep: Array | None = None,
) -> Array:
    """Return logits (b, classes), or the features (b, d) when the model has no head.

    `drop_path_keep` (depth, 2, b) holds one mask for the attention and one for the MLP of each block.
    """
    patch, eps = pair(config.patch_size), config.norm_eps
    tokens = patch_embed(params, images, patch)
    grid = (tokens.shape[1], tokens.shape[2])
    tokens = tokens.reshape(len(images), grid[0] * grid[1], -1)
    x = np.insert(tokens, 0, params["class_token"][0, 0], axis=1)
    x = x + position_table(
        params["pos_embed"], patch_grid(pair(config.image_size), patch), grid, "head"
    )

    rates = drop_path_rates(config)
    for i in range(config.depth):
        block = subset(params, f"blocks.{i}")
        keep = np.ones((2, 1)) if drop_path_keep is None else drop_path_keep[i] / (1 - rates[i])
        keep_attention, keep_mlp = keep[:, :, None, None]
        normed = layer_norm(x, block["norm1.scale"], block["norm1.bias"], eps)
        inner = subset(block, "attn")
        if config.pooling == "none":
            mixed = attention(inner, convolve(inner, config, normed), config.num_heads)
        else:
            mixed = pooled_attention(inner, config, normed, i, grid)
        x = x + linear(inner, "proj", mixed) * keep_attention
        normed = layer_norm(x, block["norm2.scale"], block["norm2.bias"], eps)
        x = x + linear(block, "mlp.fc2", gelu(linear(block, "mlp.fc1", normed))) * keep_mlp

    if config.head_pool == "mean":
        pooled = layer_norm(
            x[:, 1:].mean(axis=1), params["fc_norm.scale"], params["fc_norm.bias"], eps
        )
    else:
        pooled = layer_norm(x, params["norm.scale"], params["norm.bias"], eps)[:, 0]
    return linear(params, "head", pooled) if config.num_classes else pooled

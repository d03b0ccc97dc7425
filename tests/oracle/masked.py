"""Masked autoencoders: which patches are kept, pooling over a ragged grid, encoder, decoder and pixel loss.

Every image is handled by itself, in loops. The backward direction of a pooled block pairs the reversed tokens with
the row ids of the forward order ("released"), or with the rows that the tokens lie in ("consistent").
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tests.oracle.mixer import branch, mixer, subset
from tests.oracle.ops import Array, layer_norm, linear, norm, selective_scan, silu, sincos_table
from tests.oracle.pooling import every_token
from tests.oracle.vision_mamba import is_transposed, pair, patch_embed
from tests.oracle.vit import vit_block


def random_masking(
    noise: Array, kept: int, by_position: bool = True
) -> tuple[list[list[int]], Array, Array]:
    """Return kept ids of every image, ids_restore and the mask (1 = removed)."""
    keep, restore, mask = [], np.zeros(noise.shape, int), np.ones(noise.shape)
    for b, row in enumerate(noise):
        ranked = [int(i) for i in np.argsort(row, kind="stable")]
        first, rest = ranked[:kept], ranked[kept:]
        first = sorted(first) if by_position else first
        for place, patch in enumerate(first + rest):
            restore[b, patch] = place
        mask[b, first] = 0
        keep.append(first)
    return keep, restore, mask


def row_sums(
    tokens: Array, ids: list[int], rows: int, columns: int, method: str, divisor: str
) -> Array:
    """Pool each row's tokens, (l, e) -> (rows, e); rows without any are zero."""
    pooled = np.zeros((rows, tokens.shape[1]))
    for r in range(rows):
        members = tokens[[t for t, row in enumerate(ids) if row == r]]
        if len(members) == 0:
            continue
        if method == "max":
            pooled[r] = members.max(axis=0)
        else:
            count = len(members) + 1e-6 if divisor == "count" else columns
            pooled[r] = members.sum(axis=0) / count
    return pooled


def ragged_branch(
    params: dict[str, Array],
    config: SimpleNamespace,
    x: Array,
    ids: list[int],
    rows: int,
    columns: int,
) -> Array:
    """Run one direction of one image over (l, e), in that direction's order; `ids` says what row each token reads."""
    whole = branch(
        params,
        SimpleNamespace(**vars(config) | {"pooling": "none"}),
        x[None],
        every_token(len(x)),
        None,
    )
    tokens = whole["conv"][0]
    u = row_sums(tokens, ids, rows, columns, config.pooling, config.divisor)
    if config.pooling == "mean":
        u = u * config.pool_scale
    size = params["A_log"].shape[1]
    projected = linear(params, "x_proj", u)
    rank = projected.shape[-1] - 2 * size
    dt, B, C = np.split(projected, [rank, rank + size], axis=-1)
    delta, A = dt @ params["dt_proj.kernel"], -np.exp(params["A_log"])
    y, _ = selective_scan(
        u[None], delta[None], A, B[None], C[None], delta_bias=params["dt_proj.bias"]
    )
    return y[0][ids] + params["D"] * tokens


def ragged_mixer(
    params: dict[str, Array],
    config: SimpleNamespace,
    hidden: Array,
    ids: list[int],
    grid: tuple[int, int],
) -> Array:
    """Mix (l, d) -> (l, d) of one image whose tokens lie at the ascending positions `ids` of the grid."""
    rows, columns = grid
    of_row = [i // columns for i in ids]
    x, z = np.split(linear(params, "in_proj", hidden), 2, axis=-1)
    forward = ragged_branch(subset(params, "forward"), config, x, of_row, rows, columns)
    seen = of_row if config.reversal == "released" else [rows - 1 - r for r in of_row[::-1]]
    backward = ragged_branch(subset(params, "backward"), config, x[::-1], seen, rows, columns)
    y = (forward + backward[::-1]) / 2
    if config.post_norm != "none":
        y = norm(config.post_norm, params, "post_norm", y, 1e-5)
    return linear(params, "out_proj", y * silu(z))


def encode_image(
    params: dict[str, Array],
    config: SimpleNamespace,
    tokens: Array,
    ids: list[int],
    grid: tuple[int, int],
) -> Array:
    """Return the latent (k, d) of one image's kept tokens, which carry their positions; a class token is part of it."""
    pooled = config.pooling != "none"
    if not pooled and config.class_token != "none":
        at = {"head": 0, "middle": len(ids) // 2}[config.class_token]
        tokens = np.insert(tokens, at, params["class_token"][0, 0], axis=0)
    for i in range(config.depth):
        block = subset(params, f"blocks.{i}")
        normed = norm(config.norm, block, "norm", tokens, config.norm_eps)
        inner = subset(block, "mixer")
        if not pooled:
            mixed = mixer(inner, config, normed[None], every_token(len(tokens)))[0][0]
        elif is_transposed(config, i):
            turned = [(k % grid[1]) * grid[0] + k // grid[1] for k in ids]
            order = np.argsort(turned)
            mixed = np.zeros_like(normed)
            mixed[order] = ragged_mixer(inner, config, normed[order], sorted(turned), grid[::-1])
        else:
            mixed = ragged_mixer(inner, config, normed, ids, grid)
        tokens = tokens + mixed
    return norm(config.norm, params, "norm", tokens, config.norm_eps)


def masked_autoencoder(
    params: dict[str, Array],
    config: SimpleNamespace,
    images: Array,
    keep: list[list[int]],
    tables: tuple[Array, Array] | None = None,
) -> tuple[Array, list[Array]]:
    """Return predicted patches (b, l, p q c) and the latents of every image.

    `config` has the encoder's fields and `decoder_dim`, `decoder_depth`, `decoder_heads`, `divisor`, `reversal`,
    `vit`; `keep` the positions of every image's kept patches; `tables` replaces the position tables (l, d) of encoder
    and decoder.
    """
    encoder, decoder = subset(params, "encoder"), subset(params, "decoder")
    patches = patch_embed(encoder, images, pair(config.patch_size))
    grid = (patches.shape[1], patches.shape[2])
    length = grid[0] * grid[1]
    dtype = np.float64 if config.vit else np.float32
    table, decoder_table = tables or (
        sincos_table(grid, w, dtype=dtype) for w in (config.embed_dim, config.decoder_dim)
    )
    token = encoder.get("class_token")
    predicted, latents = [], []
    for tokens, ids in zip(patches.reshape(len(images), length, -1), keep, strict=True):
        tokens = tokens[ids] + table[ids]
        if config.vit:
            tokens = np.insert(tokens, 0, token[0, 0], axis=0)
            for i in range(config.depth):
                tokens = vit_block(subset(encoder, f"blocks.{i}"), config, tokens[None])[0]
            latent = layer_norm(
                tokens, encoder["norm.scale"], encoder["norm.bias"], config.norm_eps
            )
        else:
            latent = encode_image(encoder, config, tokens, ids, grid)
        latents.append(latent)
        kept = linear(decoder, "embed", latent)
        class_token = None
        if token is not None:
            at = {"head": 0, "middle": len(ids) // 2}["head" if config.vit else config.class_token]
            class_token, kept = kept[at : at + 1], np.delete(kept, at, axis=0)
        whole = np.repeat(decoder["mask_token"][0], length, axis=0)
        whole[ids] = kept
        whole = whole + decoder_table
        if class_token is not None:
            whole = np.concatenate([class_token, whole] if config.vit else [whole, class_token])
        inner = SimpleNamespace(
            **vars(config) | {"pooling": "none", "num_heads": config.decoder_heads}
        )
        for i in range(config.decoder_depth):
            block = subset(decoder, f"blocks.{i}")
            if config.vit:
                whole = vit_block(block, inner, whole[None])[0]
            else:
                normed = norm(config.norm, block, "norm", whole, config.norm_eps)
                whole = (
                    whole
                    + mixer(subset(block, "mixer"), inner, normed[None], every_token(len(whole)))[
                        0
                    ][0]
                )
        kind = "layer" if config.vit else config.norm
        out = linear(decoder, "pixels", norm(kind, decoder, "norm", whole, config.norm_eps))
        predicted.append(out if class_token is None else out[1:] if config.vit else out[:-1])
    return np.stack(predicted), latents


def patchify(images: Array, patch: tuple[int, int]) -> Array:
    """Reshape (b, h, w, c) -> (b, l, p q c), patches row by row, channel fastest."""
    p, q = patch
    rows, columns = images.shape[1] // p, images.shape[2] // q
    patches = [
        images[:, r * p : (r + 1) * p, c * q : (c + 1) * q].reshape(len(images), -1)
        for r in range(rows)
        for c in range(columns)
    ]
    return np.stack(patches, axis=1)


def pixel_loss(
    images: Array, predicted: Array, mask: Array, patch: tuple[int, int], normalise: bool
) -> float:
    """Compute the mean squared error over the removed patches (mask 1)."""
    target = patchify(images, patch)
    if normalise:
        deviation = np.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
        target = (target - target.mean(axis=-1, keepdims=True)) / deviation
    error = ((predicted - target) ** 2).mean(axis=-1)
    return float((error * mask).sum() / mask.sum())

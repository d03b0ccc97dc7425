"""The channel models: one token per patch and channel, pooled over one or two of the grid's three axes, or not at all.

Every channel passes the same patch kernel and gets an embedding of its own; positions are shared by the channels.
Steps of the scan are found by the coordinates that their tokens share, not by reshaping, so that the package's views
of the grid are checked against something else.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tests.oracle.mixer import mixer, subset
from tests.oracle.ops import Array, cubic_matrix, gelu, layer_norm, linear, norm
from tests.oracle.pooling import Steps, every_token
from tests.oracle.vision_mamba import drop_path_rates, pair, patch_grid
from tests.oracle.vit import attention


def embed_channels(
    params: dict[str, Array],
    images: Array,
    ids: Array,
    patch: tuple[int, int],
    stride: tuple[int, int],
) -> Array:
    """Embed (b, h, w, k) -> (b, rows, columns, k, d): one product per patch and channel.

    Ids (b, k) name the channels.
    """
    batch, height, width, count = images.shape
    rows, columns = (height - patch[0]) // stride[0] + 1, (width - patch[1]) // stride[1] + 1
    kernel = params["patch_embed.proj.kernel"][:, :, 0]
    tokens = np.zeros((batch, rows, columns, count, kernel.shape[-1]))
    for r in range(rows):
        for c in range(columns):
            down, right = r * stride[0], c * stride[1]
            for k in range(count):
                window = images[:, down : down + patch[0], right : right + patch[1], k]
                tokens[:, r, c, k] = np.tensordot(window, kernel, axes=2)
    embedding = params["patch_embed.channel_embed"][np.broadcast_to(ids, (batch, count))]
    return tokens + params["patch_embed.proj.bias"] + embedding[:, None, None]


def coordinates(config: SimpleNamespace, grid: tuple[int, int], count: int) -> list[dict[str, int]]:
    """Return row, column and channel of every token in the order in which the model stores them."""
    lengths = {"row": grid[0], "column": grid[1], "channel": count}
    axes = ("row", "column", "channel")
    if config.scan_order == "spatial":
        axes = ("channel", "row", "column")
    return [
        dict(zip(axes, place, strict=True)) for place in np.ndindex(*(lengths[a] for a in axes))
    ]


def block_steps(
    config: SimpleNamespace, block: int, places: list[dict[str, int]]
) -> tuple[Array, Steps]:
    """Return the order in which a block reads the tokens, and its scan steps over that order."""
    if config.pooling == "none":
        return np.arange(len(places)), every_token(len(places))
    if config.pool_axes == "two_axes":
        turned, kept = [(False, ("row",)), (True, ("column",)), (False, ("channel",))][block % 3]
    else:
        turned = {"alternate": block % 2 == 1, "columns": False, "rows": True}[config.pool_axes]
        kept = ("column" if turned else "row", "channel")
    axes = ("column", "row") if turned else ("row", "column")
    axes = (*axes, "channel") if config.scan_order == "channel" else ("channel", *axes)
    order = sorted(range(len(places)), key=lambda t: tuple(places[t][axis] for axis in axes))
    steps: dict[tuple[int, ...], list[int]] = {}
    kept = tuple(axis for axis in axes if axis in kept)
    for position, token in enumerate(order):
        steps.setdefault(tuple(places[token][axis] for axis in kept), []).append(position)
    return np.array(order), [steps[key] for key in sorted(steps)]


def channel_mamba(
    params: dict[str, Array],
    config: SimpleNamespace,
    images: Array,
    *,
    channel_ids: Array | None = None,
    drop_path_keep: Array | None = None,
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Return logits (b, classes), or features (b, d) without a head; and (residual, hidden) of every block."""
    patch = pair(config.patch_size)
    stride = patch if config.stride is None else pair(config.stride)
    count = images.shape[-1]
    ids = np.arange(count)[None] if channel_ids is None else channel_ids
    tokens = embed_channels(params, images, ids, patch, stride)
    built = (
        (pair(config.image_size)[0] - patch[0]) // stride[0] + 1,
        (pair(config.image_size)[1] - patch[1]) // stride[1] + 1,
    )
    if config.token_order == "column":
        tokens, built = tokens.transpose(0, 2, 1, 3, 4), built[::-1]
    grid = tokens.shape[1:3]
    if config.pos_embed:
        table = params["pos_embed"].reshape(*built, -1)
        if built != grid:
            resize = [cubic_matrix(b, g) for b, g in zip(built, grid, strict=True)]
            table = np.einsum("ij,kl,jld->ikd", *resize, table)
        tokens = tokens + table[None, :, :, None]
    if config.scan_order == "spatial":
        tokens = tokens.transpose(0, 3, 1, 2, 4)
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    places = coordinates(config, grid, count)
    class_at = {"none": None, "middle": tokens.shape[1] // 2, "head": 0}[config.class_token]
    if class_at is not None:
        tokens = np.insert(tokens, class_at, params["class_token"][0, 0], axis=1)
        places.insert(class_at, {})

    rates = drop_path_rates(config)
    residual, trace = tokens, []
    for i in range(config.depth):
        block = subset(params, f"blocks.{i}")
        order, steps = block_steps(config, i, places)
        normed = norm(config.norm, block, "norm", residual, config.norm_eps)
        mixed, _ = mixer(subset(block, "mixer"), config, normed[:, order], steps, class_at)
        hidden = mixed[:, np.argsort(order)]
        trace.append((residual, hidden))
        keep = (
            1.0 if drop_path_keep is None else (drop_path_keep[i] / (1 - rates[i]))[:, None, None]
        )
        residual = residual + hidden * keep
    final = norm(config.norm, params, "norm", residual, config.norm_eps)
    if class_at is not None:
        pooled = final[:, class_at]
    elif config.head_pool == "mean":
        pooled = final.mean(axis=1)
    elif config.head_pool == "last":
        pooled = final[:, -1]
    else:
        pooled = final
    if not config.num_classes:
        return pooled, trace
    logits = linear(params, "head", pooled)
    if config.head_pool == "max" and class_at is None:
        logits = logits.max(axis=1)
    return logits, trace


def stretched(table: Array, grid: tuple[int, int]) -> Array:
    """Sample a (rows, columns, d) position table as ChannelViT does: the target side counts as 0.1 patches longer.

    Output position i reads the table at (i + 0.5) · side / (n + 0.1) - 0.5, bicubic with clamped borders.
    """
    from tests.oracle.ops import cubic

    matrices = []
    for side, target in zip(table.shape[:2], grid, strict=True):
        weights = np.zeros((target, side))
        for i in range(target):
            centre = (i + 0.5) * side / (target + 0.1) - 0.5
            first = int(np.floor(centre)) - 1
            for tap in range(first, first + 4):
                weights[i, min(max(tap, 0), side - 1)] += cubic(centre - tap)
        matrices.append(weights)
    return np.einsum("ij,kl,jld->ikd", *matrices, table)


def channel_vit(
    params: dict[str, Array],
    config: SimpleNamespace,
    images: Array,
    *,
    channel_ids: Array | None = None,
    drop_path_keep: Array | None = None,
) -> Array:
    """Compute ChannelViT's logits, or features (b, d) of the class token.

    The class token stands first, then the tokens channel by channel.
    """
    patch, eps, count = pair(config.patch_size), config.norm_eps, images.shape[-1]
    ids = np.arange(count)[None] if channel_ids is None else channel_ids
    tokens = embed_channels(params, images, ids, patch, patch).transpose(0, 3, 1, 2, 4)
    grid, built = tokens.shape[2:4], patch_grid(pair(config.image_size), patch)
    table = params["pos_embed"][0, 1:].reshape(*built, -1)
    square = images.shape[1] == images.shape[2]
    if not (count == 1 and square and grid == built):
        table = stretched(table, grid)
    tokens = (tokens + table).reshape(len(images), -1, table.shape[-1])
    token = params["class_token"][0, 0] + params["pos_embed"][0, 0]
    x = np.insert(tokens, 0, token, axis=1)
    rates = drop_path_rates(config)
    for i in range(config.depth):
        block = subset(params, f"blocks.{i}")
        keep = np.ones((2, 1)) if drop_path_keep is None else drop_path_keep[i] / (1 - rates[i])
        keep_attention, keep_mlp = keep[:, :, None, None]
        normed = layer_norm(x, block["norm1.scale"], block["norm1.bias"], eps)
        inner = subset(block, "attn")
        mixed = attention(inner, normed, config.num_heads)
        x = x + linear(inner, "proj", mixed) * keep_attention
        normed = layer_norm(x, block["norm2.scale"], block["norm2.bias"], eps)
        x = x + linear(block, "mlp.fc2", gelu(linear(block, "mlp.fc1", normed))) * keep_mlp
    pooled = layer_norm(x, params["norm.scale"], params["norm.bias"], eps)[:, 0]
    return linear(params, "head", pooled) if config.num_classes else pooled

"""FastVim and Vim: patch embedding, position embedding, class token, blocks, head, dense features.

    residual = hidden in the first block, residual + drop_path(hidden) afterwards
    hidden   = mixer(norm(residual))
    final    = norm(residual + drop_path(hidden))

Images are (b, h, w, c), channels last. A column-major model flattens the grid column by column once, and rows and
columns swap their roles from there on, in the position embedding too.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tests.oracle.mixer import mixer, subset
from tests.oracle.ops import Array, layer_norm, linear, norm, resize_bicubic
from tests.oracle.pooling import Steps, every_token, rows_of, transpose_order


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def patch_grid(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Count rows and columns of the patches that cover an image, the last ones padded."""
    return -(-size[0] // patch[0]), -(-size[1] // patch[1])


def patch_embed(params: dict[str, Array], images: Array, patch: tuple[int, int]) -> Array:
    """Embed (b, h, w, c) -> (b, rows, columns, d): one product per patch, zeros padded at the bottom and right."""
    batch, height, width, _ = images.shape
    rows, columns = patch_grid((height, width), patch)
    padding = ((0, 0), (0, rows * patch[0] - height), (0, columns * patch[1] - width), (0, 0))
    padded = np.pad(images, padding)
    kernel = params["patch_embed.proj.kernel"]
    tokens = np.zeros((batch, rows, columns, kernel.shape[-1]), images.dtype)
    for r in range(rows):
        for c in range(columns):
            down, right = r * patch[0], c * patch[1]
            window = padded[:, down : down + patch[0], right : right + patch[1]]
            tokens[:, r, c] = np.tensordot(window, kernel, axes=3)
    return tokens + params["patch_embed.proj.bias"]


def position_table(
    table: Array, built: tuple[int, int], here: tuple[int, int], class_token: str
) -> Array:
    """Return the position embedding (1, l, d) of the grid it was built for, resampled to the grid at hand.

    Both grids are in the order in which the model flattens; a class token's entry stays as it is.
    """
    if built == here:
        return table
    entries = table[0]
    token = None
    token_was = class_index(built, class_token)
    if token_was is not None:
        token, entries = entries[token_was], np.delete(entries, token_was, axis=0)
    resized = resize_bicubic(entries.reshape(*built, -1), here).reshape(here[0] * here[1], -1)
    if token is not None:
        resized = np.insert(resized, class_index(here, class_token), token, axis=0)
    return resized[None]


def class_index(grid: tuple[int, int], where: str) -> int | None:
    """Return where the class token goes among the tokens of a grid: first, or at index L // 2."""
    return {"none": None, "head": 0, "middle": grid[0] * grid[1] // 2}[where]


def embed(
    params: dict[str, Array], config: SimpleNamespace, images: Array
) -> tuple[Array, tuple[int, int]]:
    """Return tokens (b, l, d) with class token and positions, and the grid in the order of flattening."""
    patch = pair(config.patch_size)
    tokens = patch_embed(params, images, patch)
    built = patch_grid(pair(config.image_size), patch)
    if config.token_order == "column":
        tokens, built = tokens.transpose(0, 2, 1, 3), built[::-1]
    batch, rows, columns, width = tokens.shape
    grid = (rows, columns)
    tokens = tokens.reshape(batch, rows * columns, width)
    class_at = class_index(grid, config.class_token)
    if class_at is not None:
        tokens = np.insert(tokens, class_at, params["class_token"][0, 0], axis=1)
    if config.pos_embed:
        tokens = tokens + position_table(params["pos_embed"], built, grid, config.class_token)
    return tokens, grid


def is_transposed(config: SimpleNamespace, block: int) -> bool:
    """Return whether a block sees the transposed grid: odd blocks if models alternate, all blocks that pool over rows.

    Rows and columns are those of the grid as it is flattened, so a column-major model swaps their roles.
    """
    return {"alternate": block % 2 == 1, "columns": False, "rows": True}[config.pool_axes]


def block_layout(
    config: SimpleNamespace, block: int, grid: tuple[int, int], class_at: int | None
) -> tuple[Array, Steps]:
    """Return the order in which a block reads the tokens, and its scan steps over that order."""
    length = grid[0] * grid[1] + (class_at is not None)
    if config.pooling == "none":
        return np.arange(length), every_token(length)
    if is_transposed(config, block):
        return transpose_order(grid, class_at), rows_of(grid[::-1], class_at)
    return np.arange(length), rows_of(grid, class_at)


def drop_path_rates(config: SimpleNamespace) -> Array:
    """Return the rate of each block's output, rising linearly from 0 to `drop_path`."""
    return np.linspace(0.0, config.drop_path, config.depth)


def run_blocks(
    params: dict[str, Array],
    config: SimpleNamespace,
    tokens: Array,
    grid: tuple[int, int],
    drop_path_keep: Array | None,
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Run all blocks. Return the final residual sum, and (residual, hidden) of every block in the stream's order."""
    class_at = class_index(grid, config.class_token)
    rates = drop_path_rates(config)
    residual, trace = tokens, []
    for i in range(config.depth):
        block = subset(params, f"blocks.{i}")
        order, steps = block_layout(config, i, grid, class_at)
        normed = norm(config.norm, block, "norm", residual, config.norm_eps)
        mixed, _ = mixer(subset(block, "mixer"), config, normed[:, order], steps, class_at)
        hidden = mixed[:, np.argsort(order)]
        trace.append((residual, hidden))
        kept = (
            hidden
            if drop_path_keep is None
            else hidden * (drop_path_keep[i] / (1 - rates[i]))[:, None, None]
        )
        residual = residual + kept
    return residual, trace


def dense_features(
    params: dict[str, Array],
    config: SimpleNamespace,
    trace: list[tuple[Array, Array]],
    grid: tuple[int, int],
) -> tuple[Array, ...]:
    """Return normed mixer outputs of the chosen blocks as (b, rows, columns, d), class token left out."""
    features = []
    class_at = class_index(grid, config.class_token)
    for j, i in enumerate(config.out_indices):
        hidden = trace[i][1]
        normed = layer_norm(
            hidden, params[f"out_norms.{j}.scale"], params[f"out_norms.{j}.bias"], 1e-5
        )
        patches = normed if class_at is None else np.delete(normed, class_at, axis=1)
        feature = patches.reshape(len(patches), *grid, -1)
        features.append(
            feature.transpose(0, 2, 1, 3) if config.token_order == "column" else feature
        )
    return tuple(features)


def vision_mamba(
    params: dict[str, Array],
    config: SimpleNamespace,
    images: Array,
    *,
    drop_path_keep: Array | None = None,
    features_only: bool = False,
) -> Array | tuple[Array, ...]:
    """Return logits (b, classes) or (b, l, classes).

    Without a head they are pooled features, with `out_indices` dense features.
    """
    tokens, grid = embed(params, config, images)
    residual, trace = run_blocks(params, config, tokens, grid, drop_path_keep)
    if config.out_indices:
        return dense_features(params, config, trace, grid)
    final = norm(config.norm, params, "norm", residual, config.norm_eps)
    class_at = class_index(grid, config.class_token)
    if class_at is not None:
        pooled = final[:, class_at]
    elif config.head_pool == "mean":
        pooled = final.mean(axis=1)
    elif config.head_pool == "last":
        pooled = final[:, -1]
    else:
        pooled = final
    if features_only or not config.num_classes:
        return pooled
    logits = linear(params, "head", pooled)
    return logits.max(axis=1) if config.head_pool == "max" and class_at is None else logits

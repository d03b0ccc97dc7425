"""Which tokens share a scan step, and what pooling and unpooling do with them.

A sequence is described by its *steps*: one list of token positions per scan step, in scan order. Without pooling
every token is a step of its own. On a grid of R rows and C columns every row is a step. A class token is a step of
its own, and when it stands inside a row, its step comes just before that row's.
"""

from __future__ import annotations

import numpy as np

from tests.oracle.ops import Array, softmax

Steps = list[list[int]]


def every_token(length: int) -> Steps:
    """Pool nothing: as many steps as tokens."""
    return [[t] for t in range(length)]


def rows_of(grid: tuple[int, int], class_at: int | None = None) -> Steps:
    """Return one step per row of a row-major grid; `class_at` is the class token's position among all tokens."""
    rows, columns = grid
    patches = [t for t in range(rows * columns + (class_at is not None)) if t != class_at]
    steps = [patches[r * columns : (r + 1) * columns] for r in range(rows)]
    if class_at is not None:
        steps.insert(class_at // columns, [class_at])
    return steps


def reversed_steps(steps: Steps) -> Steps:
    """Return the same steps seen from the end of the sequence: positions and order both turn round."""
    last = sum(len(step) for step in steps) - 1
    return [[last - t for t in step[::-1]] for step in steps[::-1]]


def pool(
    tokens: Array,
    steps: Steps,
    method: str,
    *,
    class_at: int | None = None,
    scale: float = 1.0,
    scores: Array | None = None,
) -> Array:
    """Pool (b, l, e) -> (b, s, e): mean (times `scale`), maximum, or softmax-weighted sum of each step's tokens.

    `scores` (b, l, 1) are the logits of attention pooling. The class token passes through untouched.
    """
    pooled = []
    for step in steps:
        members = tokens[:, step]
        if step == [class_at] or method == "none":
            pooled.append(members[:, 0])
        elif method == "mean":
            pooled.append(members.mean(axis=1) * scale)
        elif method == "max":
            pooled.append(members.max(axis=1))
        elif method == "attention":
            assert scores is not None
            pooled.append((softmax(scores[:, step], axis=1) * members).sum(axis=1))
        else:
            raise ValueError(f"pooling {method!r}")
    return np.stack(pooled, axis=1)


def unpool(pooled: Array, steps: Steps) -> Array:
    """Unpool (b, s, e) -> (b, l, e): every token reads the value of its step."""
    shape = pooled.shape[0], sum(len(step) for step in steps), pooled.shape[2]
    tokens = np.zeros(shape, pooled.dtype)
    for s, step in enumerate(steps):
        tokens[:, step] = pooled[:, s : s + 1]
    return tokens


def transpose_order(grid: tuple[int, int], class_at: int | None = None) -> Array:
    """Return the order in which a row-major grid's tokens are read column by column; a class token keeps its position.

    `tokens[:, order]` is the transposed sequence, `tokens[:, np.argsort(order)]` undoes it.
    """
    rows, columns = grid
    patches = [t for t in range(rows * columns + (class_at is not None)) if t != class_at]
    order = [patches[r * columns + c] for c in range(columns) for r in range(rows)]
    if class_at is not None:
        order.insert(class_at, class_at)
    return np.array(order)

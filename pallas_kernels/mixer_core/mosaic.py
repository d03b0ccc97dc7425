"""Run the mixer core's kernels behind the interface of `xla`, and choose how they are cut into blocks.

Saved for the gradient are xz and small arrays: the pooled tokens, what is computed from them, and with "max" the places
of the maxima. The two kernels of the backward pass exchange the gradient of s, the LayerNorm's input.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.mixer_core import (
    mosaic_back,
    mosaic_back_gradients,
    mosaic_back_project,
    mosaic_front,
    mosaic_front_gradients,
    mosaic_norm_gradient,
    mosaic_project_front,
    mosaic_ragged_common,
    mosaic_ragged_front,
    mosaic_ragged_staged,
    mosaic_rolling_gradients,
    mosaic_sum_norm,
    xla,
)
from pallas_kernels.mixer_core.grid import Grid, largest_divisor
from pallas_kernels.mixer_core.mosaic_common import summed
from pallas_kernels.mixer_core.types import CoreOptions, Directions, Norm, RowIds, Visit
from pallas_kernels.mosaic import PROCESSORS, SHARED_MEMORY

# Cost of starting a block of the gradients, in segments.
START = {"front_gradients": 1.5}
# Warpgroups that a processor's registers hold.
RESIDENT = {"front": 8, "front_gradients": 5}


def _bytes(kind: str, segment: int, taps: int, size: int) -> int:
    """Return the bytes of shared memory that a block needs."""
    halo = segment + 2 * (taps - 1)
    tokens = 2 * (halo + segment) if kind == "front" else 4 * halo + segment
    return tokens * 128 * size


def cut(kind: str, xz: Any, taps: int, options: CoreOptions) -> Grid | None:
    """Choose the segments and lines per block for `front` or its gradients; None if none fits.

    Of the segments that divide a line and leave room for two blocks per processor, take the longest, because halos
    are read twice. If no segment of at least 4 tokens divides the line, take the one that reads the fewest tokens. The
    gradients then take the number of segments per block that costs least: waves of blocks, times segments per block and
    the start.
    """
    batch, _, width = xz.shape
    width //= 2
    size = xz.dtype.itemsize
    fitting = [
        s
        for s in range(options.per_position, min(options.tokens, 32) + 1, options.per_position)
        if s >= taps - 1  # a halo reaches no further than the next segment
        and _bytes(kind, s, taps, size)
        <= (SHARED_MEMORY if s <= max(8, options.per_position) else 110 * 1024)
    ]
    limits = (16, 32)
    dividing = [s for s in fitting if options.tokens % s == 0 and s >= min(4, options.tokens)]
    limit = next((n for n in limits if any(4 <= s <= n for s in dividing)), 32)
    segment = max((s for s in dividing if s <= limit), default=0)
    if not segment:
        most = max(16, taps - 1, options.per_position)
        fitting = [s for s in fitting if min(4, options.tokens) <= s <= most]
        reads = lambda s: math.ceil(options.tokens / s) * (s + 2 * (taps - 1))  # noqa: E731
        segment = min(fitting, key=lambda s: (reads(s), -s), default=0)
    if not segment:
        return None
    held = SHARED_MEMORY // (_bytes(kind, segment, taps, size) + 1024)
    resident = min(RESIDENT[kind], held)
    slots = PROCESSORS * resident
    others = batch * (width // 128)
    segments = math.ceil(options.tokens / segment)

    def blocks(per_block):
        return others * options.lines * segments // per_block

    def cost(per_block):
        return math.ceil(blocks(per_block) / slots) * (per_block + START[kind])

    choices = [d * segments for d in range(1, options.lines + 1) if options.lines % d == 0]
    if kind == "front":
        # Processors stay full until the end if there are more blocks than they hold at a time.
        enough = [n for n in choices if blocks(n) >= 1.5 * slots]
        per_block = max(enough, default=segments)
    else:
        per_block = min(choices, key=lambda n: (cost(n), n))
    return Grid(
        batch=batch,
        rows=options.rows,
        columns=options.columns,
        width=width,
        transposed=options.transposed,
        taps=taps,
        segment=segment,
        per_block=per_block,
        per_position=options.per_position,
    )


def _visited(xz: Any, taps: int, ids: RowIds, options: CoreOptions) -> CoreOptions:
    """Return the grid as the kernels visit it.

    The tokens of a ragged grid lie in lines of any kind: in equal ones of up to 16 tokens, or all in one if such lines
    would be shorter than 4 tokens or than the convolutions' reach.
    """
    if not ids:
        return options
    columns = largest_divisor(xz.shape[1], 16)
    if columns < max(4, taps - 1):
        columns = xz.shape[1]
    return dataclasses.replace(options, rows=xz.shape[1] // columns, columns=columns)


def unsupported(xz: Any, kernels: Any, ids: RowIds, options: CoreOptions) -> str | None:
    """Return why the kernels cannot take this call, or None. Only the arrays' shapes and dtypes matter."""
    if xz.dtype not in (jnp.float32, jnp.bfloat16):
        return f"xz is {xz.dtype}, and the kernels compute in float32"
    if not all(isinstance(size, int) for size in xz.shape):
        return f"xz {xz.shape} has a symbolic size"
    width, taps = xz.shape[-1] // 2, kernels.shape[1]
    if width % 128:
        return f"{width} channels are not made of whole blocks of 128"
    if not 2 <= taps <= 8:
        return f"convolutions of width {taps} are not between 2 and 8"
    if 0 in xz.shape:
        return f"xz {xz.shape} is empty"
    if ids and options.rows > mosaic_ragged_common.MOST_ROWS:
        return (
            f"a ragged grid of {options.rows} rows has more than {mosaic_ragged_common.MOST_ROWS}"
        )
    options = _visited(xz, taps, ids, options)
    if options.tokens < taps - 1:
        return f"lines of {options.tokens} tokens are shorter than the convolution's reach"
    if options.per_position > 32:
        return f"{options.per_position} tokens of a position are more than the 32 of a segment"
    if options.scattered and options.per_position < taps - 1:
        return f"{options.per_position} tokens of a position are fewer than the convolution's reach"
    for kind in RESIDENT:
        if cut(kind, xz, taps, options) is None:
            return f"lines of {options.tokens} tokens of {width} channels do not cut into segments"
    return mosaic_back.unsupported(xz.shape[1]) or mosaic_back_gradients.unsupported(width)


def block_unsupported(xz, residual, kernels, options: CoreOptions, *, by_name: bool) -> str | None:
    """Return why a block does not run joined to the next block's norm, although the other kernels do, or None.

    One kernel for everything after the scans is faster at every batch size. If "pallas" was asked for by name
    (`by_name`), the block needs this kernel. Otherwise several kernels do as well, unless the batch leaves processors
    idle.
    """
    if xz.dtype != jnp.bfloat16 or residual.dtype not in (jnp.float32, jnp.bfloat16):
        return f"xz is {xz.dtype}, not bfloat16, or the residual {residual.dtype} is wider than float32"
    several = back_project_unsupported(xz.shape[-1] // 2, residual.shape[-1], options)
    if by_name or several is None:
        return several
    segments = xz.shape[0] * options.lines * math.ceil(options.tokens / mosaic_back_project.ROWS)
    full = PROCESSORS * mosaic_back_project.PER_TILE
    return f"{segments} segments of lines do not fill the device" if segments < full else None


def back_project_unsupported(width: int, outputs: int, options: CoreOptions) -> str | None:
    """Return why one kernel cannot compute everything behind the scans, or None if it can."""
    if options.per_position > 1:
        return f"a position has {options.per_position} tokens"
    return _back_project_work(1, width, outputs, options).unsupported()


def _back_project_work(batch: int, width: int, outputs: int, options: CoreOptions):
    return mosaic_back_project.Work(
        batch=batch,
        rows=options.rows,
        columns=options.columns,
        transposed=options.transposed,
        width=width,
        outputs=outputs,
    )


def project_front_unsupported(tokens, kernels, options: CoreOptions) -> str | None:
    """Return why `mosaic_project_front` cannot compute xz and the pooled tokens in one kernel, or None if it can.

    Asked only where `block_unsupported` returned None.
    """
    if options.method != "mean":
        return f"pooling by {options.method}"
    if options.per_position > 1:
        return f"{options.per_position} tokens at a position"
    return _project_front_work(tokens, kernels, options).unsupported()


def reads_x(tokens, kernels, outputs: int, options: CoreOptions) -> bool:
    """Return whether a kernel of an inference pass behind `project_front` reads x."""
    return (
        project_front_unsupported(tokens, kernels, options) is not None
        or back_project_unsupported(kernels.shape[2], outputs, options) is not None
    )


def _project_front_work(tokens, kernels, options: CoreOptions, *, with_x: bool = True):
    return mosaic_project_front.Work(
        batch=tokens.shape[0],
        rows=options.rows,
        columns=options.columns,
        transposed=options.transposed,
        inputs=tokens.shape[2],
        width=kernels.shape[2],
        taps=kernels.shape[1],
        with_x=with_x,
    )


def _on_grid(x: jax.Array, options: CoreOptions) -> jax.Array:
    return x.reshape(x.shape[0], options.rows, options.columns * options.per_position, x.shape[-1])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _as_read(y):
    """Return the scans' outputs in bfloat16, if they are, and in float32 otherwise."""
    return tuple(side if side.dtype == jnp.bfloat16 else _float32(side) for side in y)


def front(xz: jax.Array, directions: Directions, ids: RowIds, options: CoreOptions):
    """See `xla.front`; reads x out of xz in place."""
    directions32 = _float32(directions)
    if ids:
        visit = Visit(*ids)
        batch, length, width = xz.shape
        runs = mosaic_ragged_common.cut(batch, length, width // 2, PROCESSORS)
        staged = mosaic_ragged_staged.fits(length, options.rows, runs, xz.dtype.itemsize)
        run = mosaic_ragged_staged.front if staged else mosaic_ragged_front.front
        u, skip = run(
            xz, visit.rows, visit.places, *directions32, runs,
            rows=options.rows, share=options.scale / options.columns, interpret=gpu.interpreted(),
        )  # fmt: skip
        return *gpu.run_once((u, skip)), ()
    grid = cut("front", xz, directions.kernels.shape[1], options)
    out = mosaic_front.front(
        _on_grid(xz, options), *directions32, grid,
        method=options.method, scale=options.scale,
        pooled_dtype=options.pooled_dtype or jnp.float32, interpret=gpu.interpreted(),
    )  # fmt: skip
    u, skip, *places = gpu.run_once(out)
    return u, _flat(skip), tuple(places)


def back(xz, skip, y, norm: Norm, ids: RowIds, options: CoreOptions) -> jax.Array:
    """See `xla.back`. Scans' outputs in bfloat16 are read as they are."""
    ids = Visit(*ids).stored_rows if ids else ()
    y, norm = _as_read(y), _float32(norm)
    out = mosaic_back.back(xz, skip, y, ids, *norm, options, interpret=gpu.interpreted())
    return gpu.run_once(out)


def project_front(tokens, weight, directions: Directions, options: CoreOptions, with_x: bool):
    """Return xz or, without x, z; the skips; and the pooled tokens. See `block.Unprojected`.

    Use a product and `front` where one kernel cannot.
    """
    weight = weight.astype(tokens.dtype)
    width = directions.kernels.shape[2]
    if project_front_unsupported(tokens, directions.kernels, options) is not None:
        xz = jnp.matmul(tokens, weight.T)
        u, skip, _ = front(xz, directions, (), options)
        return xz if with_x else xz[..., width:], skip, u
    out = mosaic_project_front.project_front(
        tokens, weight, *_float32(directions),
        _project_front_work(tokens, directions.kernels, options, with_x=with_x),
        scale=options.scale, pooled_dtype=options.pooled_dtype or jnp.float32,
        interpret=gpu.interpreted(),
    )  # fmt: skip
    return gpu.run_once(out)


def back_project(
    xz,
    skip,
    y,
    residual,
    norm: Norm,
    projection,
    keep,
    options: CoreOptions,
    norm_eps,
) -> tuple[jax.Array, ...]:
    """Compute everything behind the scans: see `block.mixer_block`.

    Use `back`, a product, and a kernel for residual sum and norm where one kernel cannot. Only that one kernel takes z
    in the place of xz. Scans' outputs in bfloat16 are read as they are.
    """
    outputs, width = residual.shape[-1], skip.shape[-1]
    if back_project_unsupported(width, outputs, options) is not None:
        g = back(xz, skip, y, norm, (), options)
        return _add_and_normalise(g, residual, projection, keep, norm_eps)
    out = mosaic_back_project.back_project(
        *(_on_grid(x, options) for x in (skip, xz)), _as_read(y), _on_grid(residual, options),
        *_float32(norm), projection.weight.astype(skip.dtype), projection.gain.astype(jnp.float32),
        keep, _back_project_work(skip.shape[0], width, outputs, options),
        eps=options.eps, norm_eps=norm_eps, interpret=gpu.interpreted(),
    )  # fmt: skip
    return tuple(map(_flat, gpu.run_once(out)))


def _add_and_normalise(g, residual, projection, keep, norm_eps):
    """See `xla.add_and_normalise`."""
    update = xla.project(g, projection.weight)
    return add_norm(update, residual, projection.gain, None, None, keep, norm_eps)


def add_norm_unsupported(update, residual) -> str | None:
    """Return why no kernel computes residual sum and norm of such arrays, or None. `add_norm` takes any share."""
    if update.dtype != jnp.bfloat16 or residual.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the update is {update.dtype}, not bfloat16, or the residual {residual.dtype} is wider than float32"
    batch, tokens, width = residual.shape
    return mosaic_sum_norm.unsupported(batch * tokens, width)


def add_norm(update, residual, gain, shift, bias, keep, norm_eps, dtype=None):
    """See `xla.add_and_normalise_update`, which takes what the kernel does not."""
    tokens, width = residual.size // residual.shape[-1], residual.shape[-1]
    dtype = update.dtype if dtype is None else dtype
    if mosaic_sum_norm.unsupported(tokens, width) is not None:
        return xla.add_and_normalise_update(
            update, residual, gain, shift, bias, keep, norm_eps, dtype
        )
    out = mosaic_sum_norm.sum_norm(
        update, residual, *_float32((gain, shift, bias)), keep,
        dtype=jnp.dtype(dtype).name, eps=norm_eps, interpret=gpu.interpreted(),
    )  # fmt: skip
    return gpu.run_once(out)


def norm_gradient(total_bar, normed_bar, total, gain, keep, norm_eps):
    """See `xla.norm_gradient`, which takes what the kernel does not."""
    tokens, width = total.size // total.shape[-1], total.shape[-1]
    if mosaic_norm_gradient.unsupported(tokens, width) is not None:
        return xla.norm_gradient(total_bar, normed_bar, total, gain, keep, norm_eps)
    out = mosaic_norm_gradient.norm_gradient(
        total_bar, normed_bar, total, gain.astype(jnp.float32), keep,
        eps=norm_eps, interpret=gpu.interpreted(),
    )  # fmt: skip
    return gpu.run_once(out)


def layer_norm_gradient(total_bar, normed_bar, total, gain, keep, norm_eps):
    """See `xla.layer_norm_gradient`, which takes what the kernel does not."""
    tokens, width = total.size // total.shape[-1], total.shape[-1]
    if mosaic_norm_gradient.unsupported(tokens, width) is not None:
        return xla.layer_norm_gradient(total_bar, normed_bar, total, gain, keep, norm_eps)
    *bars, parts = mosaic_norm_gradient.norm_gradient(
        total_bar, normed_bar, total, gain.astype(jnp.float32), keep,
        eps=norm_eps, layer=True, interpret=gpu.interpreted(),
    )  # fmt: skip
    return *gpu.run_once(tuple(bars)), parts.sum(0)


def back_gradients(xz, skip, y, norm: Norm, out_bar, ids: RowIds, options: CoreOptions):
    """See `xla.back_gradients`."""
    return _back_gradients(xz, skip, y, norm, out_bar, ids, options, with_g=False)[:-1]


def back_gradients_with_g(xz, skip, y, norm: Norm, out_bar, ids: RowIds, options: CoreOptions):
    """See `xla.back_gradients_with_g`."""
    return _back_gradients(xz, skip, y, norm, out_bar, ids, options, with_g=True)


def _back_gradients(xz, skip, y, norm, out_bar, ids, options, *, with_g):
    s_bar, xz_bar, y_bar, norm_bar, g = mosaic_back_gradients.back_gradients(
        xz, skip, _float32(y), ids, *_float32(norm), out_bar, _visited(xz, 1, ids, options),
        with_g=with_g, interpret=gpu.interpreted(),
    )  # fmt: skip
    norm_bar = summed(norm_bar, norm, options.norm_kind)
    y_bars = (y_bar, y_bar)
    if ids:
        forward, backward = (xla.row_sums(s_bar, of_row, options.rows) / 2 for of_row in ids)
        y_bars = (forward, backward)
    return s_bar, xz_bar, y_bars, norm_bar, g


def front_gradients(
    xz, s_bar, xz_bar, pooled_bar, places, directions: Directions, ids: RowIds, options: CoreOptions
):
    """See `xla.front_gradients`."""
    taps = directions.kernels.shape[1]
    visited = _visited(xz, taps, ids, options)
    grid = cut("front_gradients", xz, taps, visited)
    directions32 = _float32(directions)
    tokens = (_on_grid(x, visited) for x in (xz, s_bar, xz_bar))
    share = 1.0 if places else options.scale / options.positions
    arrays = (*tokens, _float32(pooled_bar), places)
    static: dict[str, Any] = {"share": share, "interpret": gpu.interpreted()}
    if ids or grid.overlaps or grid.per_position > 1:
        run = mosaic_front_gradients.front_gradients
        xz_bar, shares = run(*arrays, ids, *directions32, grid, **static)
    else:
        run = mosaic_rolling_gradients.front_gradients
        xz_bar, shares = run(*arrays, *directions32, grid, **static)
    sums = shares.sum(0)
    directions_bar = Directions(sums[:, :taps], sums[:, taps], sums[:, taps + 1])
    return _flat(xz_bar), jax.tree.map(lambda g, p: g.astype(p.dtype), directions_bar, directions)

"""Run a mixer's core, everything between its two projections, with the kernels of `pallas_kernels.mixer_core`.

`runs_fused` says whether the kernels can run a mixer; `fused_core` runs them. `Mixer.core` defines what they compute,
and runs step by step on every other platform and for every other pooling and option. A new pooling that has a kernel
adds one line to `CORES`.

`runs_joined` and `joined_block` are the same for a block as a whole: `pallas_kernels.mixer_core.mixer_block` also does
the output projection, the residual sum and the next block's norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastvim_jax.layers.channel_pooling import ChannelLines, ChannelPooling
from fastvim_jax.layers.direction import MixerConfig, ScanDirection
from fastvim_jax.layers.fused_scans import pooled_dtype, scans_of
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling, max_by_argmax
from fastvim_jax.layers.ragged_pooling import RaggedPooling
from fastvim_jax.typing import Tokens
from pallas_kernels import gpu
from pallas_kernels.derivatives import differentiated_as
from pallas_kernels.mixer_core import (
    Convolutions,
    Directions,
    Norm,
    Projection,
    Unprojected,
    add_norm,
    add_norm_unsupported,
    block_unsupported,
    mixer_block,
    mixer_core,
    sequence_core,
)
from pallas_kernels.sharding import cast_parameter


class Core(NamedTuple):
    """Fused kernels for one class of poolings.

    Attributes:
        unsupported: `unsupported(config, pooling)` returns the reason why the kernels cannot compute this mixer with
            this pooling, or None if they can.
        run: `run(xz, pooling, both, post_norm)` maps in_proj's output xz `b l 2e` to out_proj's input `b l e`.
    """

    unsupported: Callable[[MixerConfig, Any], str | None]
    run: Callable[[jax.Array, Any, ScanDirection, Any], jax.Array]


def runs_fused(config: MixerConfig, pooling: Pooling) -> bool:
    """Return whether the fused kernels can compute a mixer with this pooling, on this machine."""
    if config.scan_implementation not in ("auto", "pallas") or gpu.kernels_missing() is not None:
        return False
    reason = unsupported(config, pooling)
    if reason is not None and isinstance(pooling, ChannelPooling):
        gpu.log_once(
            f"mixer: a channel grid runs without the fused kernels around the scan: {reason}"
        )
    return reason is None


def unsupported(config: MixerConfig, pooling: Pooling) -> str | None:
    """Return why the fused kernels cannot compute a mixer with this pooling on any machine, or None if they can.

    They may still refuse a size: see `unsupported` of the kernels' modules, which `analysis.coverage` asks as well.
    """
    if config.conv_width < 2:
        return f"conv_width={config.conv_width}"
    core = CORES.get(type(pooling))
    if core is None:
        return f"no kernels for {type(pooling).__name__}"
    return core.unsupported(config, pooling)


def fused_core(xz: jax.Array, pooling: Pooling, both: ScanDirection, post_norm: Any) -> jax.Array:
    """Run everything between the two projections: xz `b l 2e` → `b l e`. Call `runs_fused` first.

    Args:
        xz: x and z one after the other on the channel axis, in stored token order.
        pooling: an instance of a class that is a key of `CORES`.
        both: both directions' parameters with a leading axis of two (`stack_directions`).
        post_norm: norm over the inner channels: LayerNorm, RMSNorm or None, as `both.config.post_norm` says.

    Returns:
        Input of out_proj: in the compute dtype if the pooling is a mean, otherwise in xz's dtype.
    """
    return CORES[type(pooling)].run(xz, pooling, both, post_norm)


def _grid_unsupported(config: MixerConfig, pooling: GridPooling) -> str | None:
    if pooling.method not in ("mean", "max"):
        return f"pooling by {pooling.method}"
    return "a class token" if pooling.class_index is not None else None


def _grid_core(
    xz: jax.Array, pooling: GridPooling, both: ScanDirection, post_norm: Any
) -> jax.Array:
    lines = _lines(both.config, pooling)
    return _lines_core(xz, lines, pooling, both, post_norm)


def _lines_core(
    xz: jax.Array,
    lines: ChannelLines,
    pooling: GridPooling | ChannelPooling,
    both: ScanDirection,
    post_norm: Any,
) -> jax.Array:
    params, middle, directions = _pooled(both, lines, pooling.method)
    out = mixer_core(
        xz,
        directions,
        _norm(post_norm, both),
        params,
        middle=middle,
        scale=pooling.scale,
        eps=both.config.norm_eps,
        norm_kind=both.config.post_norm,
        **_grid_options(lines, pooling.method),
    )
    # Round the mean-pooled result to the compute dtype: this halves the bytes that out_proj reads. Otherwise `linear`
    # splits each token into two terms of that dtype, whose sum is more exact. Compared with the authors' numbers
    # (tests/parity), mean-pooled models with post norm stay accurate enough (errors of gradients are at most 5e-2 of
    # the largest entry); max-pooled and unpooled ones do not (up to 1.3e-1).
    rounded = pooling.method == "mean" and both.config.post_norm != "none"
    return out.astype(both.config.precision.compute) if rounded else out


def runs_joined(
    config: MixerConfig, pooling: Pooling, residual: jax.Array | jax.ShapeDtypeStruct
) -> bool:
    """Return whether kernels can compute a block joined to the next block's RMSNorm, on this machine.

    Of the residual stream `b l d` only shape and dtype matter.
    """
    precision = config.precision
    wanted = (
        precision.activations == "compute"
        and not config.proj_bias
        and config.layer_scale is None
        and runs_fused(config, pooling)
    )
    if not wanted:
        return False
    if not isinstance(pooling, GridPooling | ChannelPooling):
        update = jax.ShapeDtypeStruct(residual.shape, precision.compute)
        return add_norm_unsupported(update, residual) is None
    lines = _lines(config, pooling)
    if lines.reorder or config.post_norm != "layer":
        return False
    taps = jax.ShapeDtypeStruct((2, config.conv_width, config.inner), precision.params)
    xz = jax.ShapeDtypeStruct((*residual.shape[:2], 2 * config.inner), precision.compute)
    return block_unsupported(xz, residual, taps, **_grid_options(lines, pooling.method)) is None


def joined_block(
    unprojected: Unprojected,
    residual: jax.Array,
    pooling: Pooling,
    both: ScanDirection,
    post_norm: Any,
    projection: Projection,
    norm_eps: float,
    keep: jax.Array | None,
    keep_tokens: bool,
) -> tuple[jax.Array, jax.Array]:
    """Run everything from in_proj of one block to the input of in_proj of the next. Call `runs_joined` first.

    Args:
        unprojected: normalised tokens `b l d`, in stored order, and in_proj's kernel, transposed.
        residual: residual stream `b l d`.
        pooling, both, post_norm: see `fused_core`.
        projection: out_proj's kernel, transposed, and the scale of the next block's RMSNorm.
        norm_eps: epsilon of the RMSNorm.
        keep: drop-path factors `b` on the block's output, or None.
        keep_tokens: see `mixer_block`; blocks that pool no lines keep their tokens in any case.

    Returns:
        The new residual stream, and its normalised tokens in the dtype of the tokens given.
    """
    if not isinstance(pooling, GridPooling | ChannelPooling):
        update = _update(unprojected, pooling, both, post_norm, projection.weight)
        return add_norm(update, residual, projection.gain, norm_eps=norm_eps, keep=keep)
    lines = _lines(both.config, pooling)
    graphdef, params = nnx.split((both, post_norm))

    def run(scanned, unprojected, residual, params, projection, keep):
        both, post_norm = nnx.merge(graphdef, params)
        params, middle, directions = _pooled(both, lines, pooling.method, scanned)
        return mixer_block(
            unprojected,
            residual,
            directions,
            _norm(post_norm, both),
            projection,
            params,
            middle=middle,
            scale=pooling.scale,
            eps=both.config.norm_eps,
            norm_eps=norm_eps,
            keep=keep,
            keep_tokens=keep_tokens,
            pooled_dtype=pooled_dtype(both, lines, pooling.method, residual.shape[0], scanned),
            **_grid_options(lines, pooling.method),
        )

    # Δ and the scans' outputs have the compute dtype where nothing is differentiated: activations are "compute" here.
    return differentiated_as(
        partial(run, None),
        partial(run, both.config.precision.compute),
        *(unprojected, residual, params, projection, keep),
    )


def _update(
    unprojected: Unprojected,
    pooling: Pooling,
    both: ScanDirection,
    post_norm: Any,
    weight: Float[Array, "o e"],
) -> Tokens:
    """Run a mixer with the transposed kernel of its out_proj. The result `b l o` has the tokens' dtype."""
    if isinstance(pooling, RaggedPooling):
        return _ragged_update(unprojected, pooling, both, post_norm, weight)
    g = fused_core(unprojected.projected(), pooling, both, post_norm)
    return _project(g, unprojected, weight)


def _project(g: jax.Array, unprojected: Unprojected, weight: jax.Array) -> Tokens:
    dtype = unprojected.tokens.dtype
    return jnp.matmul(g.astype(dtype), cast_parameter(weight, dtype, g).T)


def _ragged_update(
    unprojected: Unprojected, pooling: RaggedPooling, both: ScanDirection, post_norm: Any, weight
) -> Tokens:
    """Run `_update` of a ragged grid in the form that is fastest where nothing is differentiated, or for a gradient.

    Without a gradient, tokens that are visited in another order than the stored one stay in their places, and the
    scans' Δ and outputs have the compute dtype: there is a row for every few of the tokens that are left, so these
    arrays are a large part of what is moved. Here activations are "compute", see `runs_joined`.

    For a gradient, tokens are moved where they are d wide, as the kernels' own gradient would move them where they are
    2e wide, and Δ and outputs are float32.
    """
    graphdef, params = nnx.split((both, post_norm))
    names = ("row_ids", "reverse_ids", "order", "inverse")

    def of(params, ids):
        return dataclasses.replace(pooling, **ids), *nnx.merge(graphdef, params)

    def run(unprojected, params, weight, ids):
        xz = unprojected.projected()
        g = _ragged_core(xz, *of(params, ids), scanned=both.config.precision.compute)
        return _project(g, unprojected, weight)

    def moved(unprojected, params, weight, ids):
        pooling, both, post_norm = of(params, ids)
        visited = unprojected._replace(tokens=pooling.to_scan_order(unprojected.tokens))
        g = _ragged_core(visited.projected(), pooling.as_stored(), both, post_norm)
        return pooling.from_scan_order(_project(g, unprojected, weight))

    ids = {name: getattr(pooling, name) for name in names}
    return differentiated_as(moved, run, unprojected, params, weight, ids)


def _lines(config: MixerConfig, pooling: GridPooling | ChannelPooling) -> ChannelLines:
    """Return the lines that the kernels pool."""
    if isinstance(pooling, ChannelPooling):
        return pooling.lines(config.conv_width)
    return ChannelLines(pooling.rows, pooling.columns, pooling.transposed, 1, reorder=False)


def _grid_options(lines: ChannelLines, method: str) -> dict[str, Any]:
    return {
        "rows": lines.rows,
        "columns": lines.columns,
        "transposed": lines.transposed,
        "per_position": lines.per_position,
        "method": method,
    }


def _channel_unsupported(config: MixerConfig, pooling: ChannelPooling) -> str | None:
    return None if pooling.method in ("mean", "max") else f"pooling by {pooling.method}"


def _channel_core(
    xz: jax.Array, pooling: ChannelPooling, both: ScanDirection, post_norm: Any
) -> jax.Array:
    lines = _lines(both.config, pooling)
    if not lines.reorder:
        return _lines_core(xz, lines, pooling, both, post_norm)
    visited = pooling.to_scan_order(xz)
    return pooling.from_scan_order(_lines_core(visited, lines, pooling, both, post_norm))


def _pooled_again(
    scans: Callable[..., Any], lines: ChannelLines, method: str
) -> Callable[..., Any]:
    """Return `scans` of the pooled tokens of lines, pooled once more over what `lines.rest` names."""
    axis = {"number": 2, "line": 3}[lines.rest or "line"]

    def run(params, u):
        grid = u.reshape(*u.shape[:2], lines.lines, lines.per_position, u.shape[-1])
        pooled = jnp.mean(grid, axis) if method == "mean" else max_by_argmax(grid, axis)

        def spread(y):
            shape = grid.shape[1:]
            return jnp.broadcast_to(jnp.expand_dims(y, axis - 1), shape).reshape(u.shape[1:])

        return tuple(spread(y) for y in scans(params, pooled))

    return run


def _sequence_core(
    xz: jax.Array, pooling: NoPooling, both: ScanDirection, post_norm: Any
) -> jax.Array:
    # Every token is a step of the scan, so the scan can add the skip D · u.
    params, scans = scans_of(both, skip=True)
    return sequence_core(
        xz,
        Convolutions(both.conv.kernel[...], _conv_bias(both)),
        _norm(post_norm, both),
        params,
        middle=scans,
        eps=both.config.norm_eps,
        norm_kind=both.config.post_norm,
    )


def _ragged_unsupported(config: MixerConfig, pooling: RaggedPooling) -> str | None:
    if pooling.method != "mean" or pooling.divisor != "row_length":
        return f"masked tokens pooled by {pooling.method}, divisor {pooling.divisor}"
    return None if pooling.valid is None else "different numbers of tokens in a batch"


def _ragged_core(
    xz: jax.Array,
    pooling: RaggedPooling,
    both: ScanDirection,
    post_norm: Any,
    scanned: jnp.dtype | None = None,
) -> jax.Array:
    params, scans, directions = _pooled(both, scanned=scanned)
    places = None
    if pooling.order is not None and pooling.inverse is not None:
        places = pooling.order, pooling.inverse
    out = mixer_core(
        xz,
        directions,
        _norm(post_norm, both),
        params,
        middle=scans,
        rows=pooling.rows,
        columns=pooling.columns,
        row_ids=(pooling.row_ids, pooling.reverse_ids),
        places=places,
        scale=pooling.scale,
        eps=both.config.norm_eps,
        norm_kind=both.config.post_norm,
    )
    # Round for the reason given in `_lines_core`.
    return out.astype(both.config.precision.compute) if both.config.post_norm != "none" else out


CORES: dict[type, Core] = {
    GridPooling: Core(_grid_unsupported, _grid_core),
    RaggedPooling: Core(_ragged_unsupported, _ragged_core),
    ChannelPooling: Core(_channel_unsupported, _channel_core),
    NoPooling: Core(lambda config, pooling: None, _sequence_core),
}
"""Fused kernels by the class of the pooling. A class without an entry never runs fused."""


def _norm(post_norm: Any, both: ScanDirection) -> Norm:
    """Return the norm's scale and shift; zeros for what it does not have."""
    zeros = jnp.zeros_like(both.D[...][0])
    if post_norm is None:
        return Norm(zeros, zeros)
    bias = getattr(post_norm, "bias", None)
    return Norm(post_norm.scale[...], zeros if bias is None else bias[...])


def _conv_bias(both: ScanDirection) -> jax.Array:
    """Return both convolutions' biases `2 e`, zeros if they have none."""
    kernel = both.conv.kernel[...]
    return jnp.zeros_like(kernel[:, 0]) if both.conv.bias is None else both.conv.bias[...]


def _pooled(
    both: ScanDirection,
    lines: ChannelLines | None = None,
    method: str = "mean",
    scanned: jnp.dtype | None = None,
) -> tuple[Any, Callable[..., Any], Directions]:
    """Return `scans_of` of pooled tokens, and what the kernels around them read.

    The scans pool the tokens of `lines` once more where `lines.rest` says so, by `method`.

    With unpool="after_skip" the skip reads the pooled tokens. Then the scans add it, and the kernels' own D is zero.
    """
    after = both.config.unpool == "after_skip"
    params, scans = scans_of(both, skip=after, scanned=scanned)
    D = both.D[...]
    directions = Directions(
        both.conv.kernel[...], _conv_bias(both), jnp.zeros_like(D) if after else D
    )
    if lines is not None and lines.rest is not None:
        scans = _pooled_again(scans, lines, method)
    return params, scans, directions

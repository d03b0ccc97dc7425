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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fastvim_jax.layers.channel_pooling import ChannelLines, ChannelPooling
from fastvim_jax.layers.direction import KEPT, MixerConfig, ScanDirection
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
    WithGradientForm,
    add_norm,
    add_norm_unsupported,
    block_unsupported,
    mixer_block,
    mixer_core,
    sequence_core,
)
from pallas_kernels.selective_scan import (
    KEPT_STEPS,
    Known,
    ScanWeights,
    bidirectional_scan,
    instead,
    known_scan,
    known_scan_unsupported,
    projected_scan,
    projected_unsupported,
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
            pooled_dtype=_pooled_dtype(both, lines, pooling.method, residual.shape[0], scanned),
            **_grid_options(lines, pooling.method),
        )

    # Δ and the scans' outputs have the compute dtype where nothing is differentiated: activations are "compute" here.
    return differentiated_as(
        partial(run, None),
        partial(run, both.config.precision.compute),
        *(unprojected, residual, params, projection, keep),
    )


def _pooled_dtype(
    both: ScanDirection, lines: ChannelLines, method: str, batch: int, scanned: jnp.dtype | None
) -> jnp.dtype | None:
    """Return `scanned` if the pooled tokens are rounded to it, or None if they stay wide.

    They are means that one kernel for projections and scans reads, and nothing else does: no skip, no second pooling.
    """
    plain = method == "mean" and lines.rest is None and both.config.unpool != "after_skip"
    if scanned != jnp.bfloat16 or not plain or both.scan_weights is None:
        return None
    shape = (2, batch, lines.lines * lines.per_position, both.D.shape[-1])
    u = jax.ShapeDtypeStruct(shape, scanned)
    return scanned if projected_unsupported(u, _scan_weights(both, scanned)) is None else None


def _scan_weights(both: ScanDirection, dtype: jnp.dtype) -> ScanWeights:
    """Return what `projected_scan` reads for tokens of a dtype; see `prepare_scan`."""
    project, step, bias, A, *narrow = both.scan_weights
    if dtype == jnp.bfloat16:
        project, step = narrow
    return ScanWeights(*(w[...] for w in (project, step, bias, A)))


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
    params, scans = _scans(both, skip=True)
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
    """Return `_scans` of pooled tokens, and what the kernels around them read.

    The scans pool the tokens of `lines` once more where `lines.rest` says so, by `method`.

    With unpool="after_skip" the skip reads the pooled tokens. Then the scans add it, and the kernels' own D is zero.
    """
    after = both.config.unpool == "after_skip"
    params, scans = _scans(both, skip=after, scanned=scanned)
    D = both.D[...]
    directions = Directions(
        both.conv.kernel[...], _conv_bias(both), jnp.zeros_like(D) if after else D
    )
    if lines is not None and lines.rest is not None:
        scans = _pooled_again(scans, lines, method)
    return params, scans, directions


def _scans(
    both: ScanDirection, *, skip: bool, scanned: jnp.dtype | None = None
) -> tuple[Any, Callable[..., Any]]:
    """Return both directions' parameters, and a function (params, u `2 b s e`) → (y_forward, y_backward).

    The function projects u to Δ, B and C and runs the scans. It treats both directions at once: one product for each
    projection and one kernel for the scans, because there are so few pooled tokens that launching a kernel takes longer
    than running it. With `skip`, the scans add D · u. Δ and both results are rounded to the dtype `scanned` if it is
    given. Where `projected_scan` takes the products, Δ is not written, and stays float32.
    """
    config = both.config
    wide = config.precision.wide
    narrow = config.precision.compute == jnp.bfloat16
    graphdef, params = nnx.split(both)

    def inputs(params, u, *known):
        direction = nnx.merge(graphdef, params)
        A = checkpoint_name(-jnp.exp(direction.A_log[...].astype(wide)), KEPT)
        D, bias = (p[...].astype(wide) for p in (direction.D, direction.dt_proj.bias))
        return *direction.select(u, *known), A, D, bias

    def around_known(params, u, known: Known):
        direction = nnx.merge(graphdef, params)
        A = -jnp.exp(direction.A_log[...].astype(wide))
        step = direction.dt_proj
        kernels = direction.x_proj.kernel[...], step.kernel[...]
        weights = (w.astype(jnp.float32) for w in (*kernels, A, step.bias[...]))
        return known_scan(config.scan_implementation == "pallas", u, *weights, known)

    def scans(params, u, known: Known | None = None):
        if known is not None and narrow:
            if known_scan_unsupported(u, known.columns.shape[-1]) is None:
                return around_known(params, u, known)
        # All arrays have a leading axis of two, the directions.
        given = () if known is None else (known.delta, known.columns)
        delta, B, C, A, D, bias = jax.vmap(inputs)(params, u, *given)
        if scanned is not None:
            delta = delta.astype(scanned)
        both_selected = jnp.stack([B, C]).astype(wide)
        if known is None:
            B, C = checkpoint_name(_written_at_once(both_selected), KEPT)
        else:
            B, C = instead(both_selected, known.BC)
        return bidirectional_scan(
            u,
            delta,
            A,
            B,
            C,
            D=D if skip else None,
            delta_bias=bias,
            y_dtype=scanned,
            implementation=config.scan_implementation,
        )

    def steps(params, u, known: Known | None = None):
        return scans(params, u.astype(wide), known)

    def projected(params, u):
        weights = arrays(params, u.dtype)
        return projected_scan(u, weights, params, step_by_step=steps, y_dtype=scanned)

    def arrays(params, dtype):
        return _scan_weights(nnx.merge(graphdef, params), dtype)

    one_kernel = not skip and both.scan_weights is not None
    middle = projected if one_kernel else scans

    def for_gradient(params, u):
        if one_kernel and projected_unsupported(u, arrays(params, u.dtype)) is None:
            return projected(params, u)
        # Longer scans keep states of the forward pass beside Δ, and computing these again would take another scan.
        keeps_states = u.shape[2] not in KEPT_STEPS
        return (scans if keeps_states else jax.checkpoint(scans, policy=_KEEP_NO_DELTA))(params, u)

    forms: Any = WithGradientForm(middle, for_gradient)
    return params, forms


# Δ is as large as the pooled tokens, and a product of few terms makes it from x_proj's columns, which are kept anyway.
_KEEP_NO_DELTA = jax.checkpoint_policies.save_only_these_names(KEPT)


@jax.custom_vjp
def _written_at_once(parts: jax.Array) -> jax.Array:
    """Return `parts` behind an optimization barrier.

    XLA then writes B and C with one kernel, and the scan reads slices of that buffer.
    """
    return jax.lax.optimization_barrier(parts)


# Pass the gradient through without a barrier. JAX's own rule would put one there too, which would keep XLA from fusing
# the gradients of B and C with the other gradients of x_proj's output.
_written_at_once.defvjp(
    lambda parts: (_written_at_once(parts), None), lambda _, gradient: (gradient,)
)

"""Run a mixer's core, all between its two projections, with the fused kernels of `pallas_kernels.mixer_core`.

`runs_fused` says whether the kernels can run a mixer; `fused_core` runs them. `Mixer.core` defines what they compute,
and runs step by step on every other platform and for every other pooling and option. A new pooling that has a kernel
adds one line to `CORES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.layers.channel_pooling import ChannelPooling
from fastvim_jax.layers.direction import MixerConfig, ScanDirection
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from fastvim_jax.layers.ragged_pooling import RaggedPooling
from pallas_kernels import gpu
from pallas_kernels.mixer_core import Convolutions, Directions, Norm, mixer_core, sequence_core
from pallas_kernels.selective_scan import bidirectional_scan


class Core(NamedTuple):
    """Fused kernels for one class of poolings.

    Attributes:
        takes: `takes(config, pooling)` says whether the kernels can compute this mixer with this pooling.
        run: `run(xz, pooling, both, post_norm)` maps in_proj's output xz `b l 2e` to out_proj's input `b l e`.
    """

    takes: Callable[[MixerConfig, Any], bool]
    run: Callable[[jax.Array, Any, ScanDirection, Any], jax.Array]


def runs_fused(config: MixerConfig, pooling: Pooling) -> bool:
    """Return whether the fused kernels can compute a mixer with this pooling, on this machine."""
    wanted = (
        config.scan_implementation in ("auto", "pallas")
        and config.post_norm == "layer"
        and config.conv_width >= 2
        and config.conv_bias
        and gpu.kernels_missing() is None
    )
    if not wanted:
        return False
    core = CORES.get(type(pooling))
    taken = core is not None and core.takes(config, pooling)
    if not taken and isinstance(pooling, ChannelPooling):
        gpu.log_once(
            "mixer: a channel grid whose pooled tokens are not next to each other in scan order, or are pooled by "
            "attention, runs without the fused kernels around the scan"
        )
    return taken


def fused_core(xz: jax.Array, pooling: Pooling, both: ScanDirection, post_norm: Any) -> jax.Array:
    """Run everything between the two projections: xz `b l 2e` → `b l e`. Call `runs_fused` first.

    Args:
        xz: x and z one after the other on the channel axis, in stored token order.
        pooling: an instance of a class that is a key of `CORES`.
        both: both directions' parameters with a leading axis of two (`stack_directions`).
        post_norm: LayerNorm over the inner channels.

    Returns:
        Input of out_proj: in the compute dtype if the pooling is a mean, otherwise in xz's dtype.
    """
    return CORES[type(pooling)].run(xz, pooling, both, post_norm)


def _grid_takes(config: MixerConfig, pooling: GridPooling) -> bool:
    pools = pooling.method in ("mean", "max") and pooling.class_index is None
    return pools and config.unpool == "before_skip"


def _grid_core(
    xz: jax.Array, pooling: GridPooling, both: ScanDirection, post_norm: nnx.LayerNorm
) -> jax.Array:
    params, scans = _scans(both, skip=False)
    out = mixer_core(
        xz,
        Directions(both.conv.kernel[...], both.conv.bias[...], both.D[...]),
        Norm(post_norm.scale[...], post_norm.bias[...]),
        params,
        middle=scans,
        rows=pooling.rows,
        columns=pooling.columns,
        transposed=pooling.transposed,
        method=pooling.method,
        scale=pooling.scale,
        eps=both.config.norm_eps,
    )
    # Round the mean-pooled result to the compute dtype: this halves the bytes that out_proj reads. `linear` keeps all
    # other tokens as two rounded terms. Mean-pooled golden models with post norm stay accurate enough (errors of
    # gradients are at most 5e-2 of the largest entry); max-pooled and unpooled ones do not (up to 1.3e-1).
    return out.astype(both.config.precision.compute) if pooling.method == "mean" else out


def _channel_takes(config: MixerConfig, pooling: ChannelPooling) -> bool:
    pools = pooling.method in ("mean", "max") and pooling.contiguous
    return pools and config.unpool == "before_skip"


def _channel_core(
    xz: jax.Array, pooling: ChannelPooling, both: ScanDirection, post_norm: nnx.LayerNorm
) -> jax.Array:
    before, members, _ = pooling.view
    lines = GridPooling(before, members, method=pooling.method, scale=pooling.scale)
    visited = pooling.to_scan_order(xz)
    return pooling.from_scan_order(_grid_core(visited, lines, both, post_norm))


def _sequence_core(
    xz: jax.Array, pooling: NoPooling, both: ScanDirection, post_norm: nnx.LayerNorm
) -> jax.Array:
    params, scans = _scans(
        both, skip=True
    )  # Every token is a step of the scan, so the scan can add the skip D · u.
    return sequence_core(
        xz,
        Convolutions(both.conv.kernel[...], both.conv.bias[...]),
        Norm(post_norm.scale[...], post_norm.bias[...]),
        params,
        middle=scans,
        eps=both.config.norm_eps,
    )


def _ragged_takes(config: MixerConfig, pooling: RaggedPooling) -> bool:
    sums = pooling.method == "mean" and pooling.divisor == "row_length"
    return sums and pooling.valid is None and config.unpool == "before_skip"


def _ragged_core(
    xz: jax.Array, pooling: RaggedPooling, both: ScanDirection, post_norm: nnx.LayerNorm
) -> jax.Array:
    params, scans = _scans(both, skip=False)
    out = mixer_core(
        pooling.to_scan_order(xz),
        Directions(both.conv.kernel[...], both.conv.bias[...], both.D[...]),
        Norm(post_norm.scale[...], post_norm.bias[...]),
        params,
        middle=scans,
        rows=pooling.rows,
        columns=pooling.columns,
        row_ids=(pooling.row_ids, pooling.reverse_ids),
        scale=pooling.scale,
        eps=both.config.norm_eps,
    )
    # Round for the reason given in `_grid_core`.
    return pooling.from_scan_order(out.astype(both.config.precision.compute))


CORES: dict[type, Core] = {
    GridPooling: Core(_grid_takes, _grid_core),
    RaggedPooling: Core(_ragged_takes, _ragged_core),
    ChannelPooling: Core(_channel_takes, _channel_core),
    NoPooling: Core(lambda config, pooling: True, _sequence_core),
}
"""Fused kernels by the class of the pooling. A class without an entry never runs fused."""


def _scans(both: ScanDirection, *, skip: bool) -> tuple[Any, Callable[..., Any]]:
    """Return both directions' parameters, and a function (params, u `2 b s e`) → (y_forward, y_backward).

    The function projects u to Δ, B and C and runs the scans. It treats both directions at once: one product for each
    projection and one kernel for the scans, because there are so few pooled tokens that launching a kernel takes longer
    than running it. With `skip`, the scans add D · u.
    """
    config = both.config
    wide = config.precision.wide
    graphdef, params = nnx.split(both)

    def inputs(params, u):
        direction = nnx.merge(graphdef, params)
        A = -jnp.exp(direction.A_log[...].astype(wide))
        D, bias = (p[...].astype(wide) for p in (direction.D, direction.dt_proj.bias))
        return *direction.select(u), A, D, bias

    def scans(params, u):
        delta, B, C, A, D, bias = jax.vmap(inputs)(params, u)
        B, C = _written_at_once(jnp.stack([B, C]).astype(wide))
        return bidirectional_scan(
            u,
            delta,
            A,
            B,
            C,
            D=D if skip else None,
            delta_bias=bias,
            implementation=config.scan_implementation,
        )

    return params, scans


@jax.custom_vjp
def _written_at_once(parts: jax.Array) -> jax.Array:
    """Return `parts` behind an optimization barrier.

    XLA then writes B and C with one kernel, and the scan reads slices of that buffer.
    """
    return jax.lax.optimization_barrier(parts)


# Pass the gradient through without a barrier. JAX's own rule would put one there too, which would keep XLA from fusing
# the gradients of B and C with the other gradients of x_proj's output.
_written_at_once.defvjp(lambda parts: (_written_at_once(parts), None), lambda _, bar: (bar,))

"""Project pooled tokens to Δ, B and C and scan them in both directions, between the kernels of a fused core."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fastvim_jax.layers.channel_pooling import ChannelLines
from fastvim_jax.layers.direction import KEPT, ScanDirection
from pallas_kernels.derivatives import differentiated_as
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


def pooled_dtype(
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


def scans_of(
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

    def plain(params, u):
        return projected(params, u) if one_kernel else scans(params, u)

    def for_gradient(params, u):
        if one_kernel and projected_unsupported(u, arrays(params, u.dtype)) is None:
            return projected(params, u)
        # Longer scans keep states of the forward pass beside Δ, and computing these again would take another scan.
        keeps_states = skip or u.shape[2] not in KEPT_STEPS
        return (scans if keeps_states else jax.checkpoint(scans, policy=_KEEP_NO_DELTA))(params, u)

    return params, functools.partial(differentiated_as, for_gradient, plain)


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

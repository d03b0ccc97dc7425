"""Where a mixer's core can run as the fused kernels of `pallas_kernels.mixer_core`, and how it is handed to them.

The plain form in `mixer` stays the definition and the path of every other platform, pooling and option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from pallas_kernels import gpu
from pallas_kernels.mixer_core import Convolutions, Directions, Norm, mixer_core, sequence_core
from pallas_kernels.selective_scan import bidirectional_scan

if TYPE_CHECKING:
    from fastvim_jax.layers.mixer import Mixer, ScanDirection


def runs_fused(mixer: Mixer, pooling: Pooling) -> bool:
    """Whether this mixer with this pooling is what the fused kernels compute, where they can run."""
    config = mixer.config
    pools = (
        isinstance(pooling, GridPooling)
        and pooling.method in ("mean", "max")
        and pooling.class_index is None
        and config.unpool == "before_skip"
    )
    return (
        config.scan_implementation in ("auto", "pallas")
        and (pools or isinstance(pooling, NoPooling))
        and config.post_norm == "layer"
        and config.conv_width >= 2
        and config.conv_bias
        and gpu.kernels_missing() is None
    )


def fused_core(mixer: Mixer, xz: jax.Array, pooling: Pooling) -> jax.Array:
    """From in_proj's output to out_proj's input: xz `b l 2e` → `b l e`. See `runs_fused`.

    In the compute dtype where means are pooled, in xz's dtype elsewhere.
    """
    if isinstance(pooling, NoPooling):
        return _unpooled_core(mixer, xz)
    assert isinstance(pooling, GridPooling), "ask runs_fused first"
    both, params, scans = _together(mixer, skip=False)
    out = mixer_core(
        xz,
        Directions(both.conv.kernel[...], both.conv.bias[...], both.D[...]),
        Norm(mixer.post_norm.scale[...], mixer.post_norm.bias[...]),
        params,
        middle=scans,
        rows=pooling.rows,
        columns=pooling.columns,
        transposed=pooling.transposed,
        method=pooling.method,
        scale=pooling.scale,
        eps=mixer.config.norm_eps,
    )
    # Rounded once, unlike all other tokens: half the bytes. The mean-pooled golden models with post norm bear it (every
    # gradient within 5e-2 of its largest entry); max-pooled and unpooled ones do not (up to 1.3e-1).
    return out.astype(mixer.config.precision.compute) if pooling.method == "mean" else out


def _unpooled_core(mixer: Mixer, xz: jax.Array) -> jax.Array:
    """The same where every token is a step of the scan, which then adds the skip."""
    both, params, scans = _together(mixer, skip=True)
    return sequence_core(
        xz,
        Convolutions(both.conv.kernel[...], both.conv.bias[...]),
        Norm(mixer.post_norm.scale[...], mixer.post_norm.bias[...]),
        params,
        middle=scans,
        eps=mixer.config.norm_eps,
    )


def join_directions(mixers: Mixer) -> Mixer:
    """Mixers whose parameters have a leading `depth` axis, with both directions' parameters `depth 2 ...` as one.

    Laid together once for all blocks: block by block it takes as many kernels as there are parameters.
    """
    joined = nnx.merge(*nnx.split(mixers))
    joined.both = _aligned(_joined(joined.forward, joined.backward, axis=1))
    del joined.forward, joined.backward
    return joined


def _aligned(both: ScanDirection) -> ScanDirection:
    """The same with the rank of Δ filled up with zeros, so that x_proj writes rows of whole 16 bytes.

    cuBLAS is twice as fast with those: 44 columns of FastVim-T, 88 bytes in bf16, become 48. In half precision dt_proj
    has zeros for B and C as well and reads the rows whole: the longer product costs less than taking its part out.
    """
    out, step = both.x_proj.kernel[...], both.dt_proj.kernel[...]  # `... e r+2n`, `... r e`
    rank, size = step.shape[-2], both.config.precision.compute.itemsize
    missing = -rank % (16 // size)
    zeros = jnp.zeros((*out.shape[:-1], missing), out.dtype)
    columns = jnp.concatenate([out[..., :rank], zeros, out[..., rank:]], axis=-1)
    below = columns.shape[-1] - rank if size < 4 else missing
    rows = jnp.concatenate(
        [step, jnp.zeros((*step.shape[:-2], below, step.shape[-1]), step.dtype)], axis=-2
    )
    both.x_proj.kernel, both.dt_proj.kernel = nnx.Param(columns), nnx.Param(rows)
    return both


def _joined(forward: ScanDirection, backward: ScanDirection, *, axis: int) -> ScanDirection:
    graphdef, first = nnx.split(forward)  # nothing that is used here depends on the direction
    stack = lambda *sides: jnp.stack(sides, axis)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(stack, first, nnx.state(backward)))


def _together(mixer: Mixer, *, skip: bool) -> tuple[ScanDirection, Any, Callable[..., Any]]:
    """Both directions as one, every parameter with a further leading axis of two; its parameters; and the scans, of
    these and of u `2 b s e`, with the skip D · u or without.

    Each projection is one product for both and the scans are one kernel, where that wins: pooled tokens are so few that
    starting a kernel takes longer than running it.
    """
    config = mixer.config
    wide = config.precision.wide
    both = mixer.both or _joined(mixer.forward, mixer.backward, axis=0)
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

    return both, params, scans


@jax.custom_vjp
def _written_at_once(parts: jax.Array) -> jax.Array:
    """The same array, by one kernel of XLA's, whose parts the scan reads where they lie; else each part has its own."""
    return jax.lax.optimization_barrier(parts)


# Not the barrier's own rule, which is one for the gradient too: there the parts join what else x_proj's columns get.
_written_at_once.defvjp(lambda parts: (_written_at_once(parts), None), lambda _, bar: (bar,))

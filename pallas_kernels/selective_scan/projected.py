"""Define `projected_scan`: the scans of both directions with their projections to Δ, B and C, as one operation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.checks import as_floats, expect_shape
from pallas_kernels.derivatives import reverse_mode_only
from pallas_kernels.selective_scan.bidirectional import bidirectional_scan
from pallas_kernels.sharding import on_cuda, per_shard

NAME = "projected_scan"
IMPLEMENTATIONS = ("auto", "pallas", "xla")
RANK_MULTIPLE = 16  # the rank of Δ is padded to a multiple of this, because the kernel reads tiles of 16 columns


class Known(NamedTuple):
    """Hold results of the projections that the kernel computed, for the gradients of `step_by_step`."""

    delta: Float[Array, "2 b l e"]  # before bias and softplus
    columns: Float[Array, "2 b l c"]  # of x_proj: r for Δ, then n for B, then n for C
    BC: Float[Array, "2 2 b l n"]  # B of both directions, then C


@jax.custom_vjp
def instead(computed: jax.Array, known: jax.Array) -> jax.Array:
    """Return `known`, the value of `computed`, which then need not be computed. Gradients flow to `computed`."""
    del computed
    return known


instead.defvjp(lambda _, known: (known, None), lambda _, gradient: (gradient, None))


class ScanWeights(NamedTuple):
    """Hold both directions' parameters of projections and scan in the kernel's layout; see `scan_weights`.

    The rank r of Δ is a multiple of 16; n is the number of states.
    """

    project: Float[
        Array, "... 2 c e"
    ]  # x_proj: c = r + 2n rows, r for Δ, then n for B, then n for C
    step: Float[Array, "... 2 e r"]  # dt_proj
    bias: Float[Array, "... 2 e"]  # bias of Δ
    A: Float[Array, "... 2 e n"]


def scan_weights(
    x_proj: Float[Array, "... 2 e c"],
    dt_proj: Float[Array, "... 2 r e"],
    bias: Float[Array, "... 2 e"],
    A: Float[Array, "... 2 e n"],
) -> ScanWeights:
    """Transpose the projections' kernels, pad the rank with zeros, and round the kernels to TF32.

    Call it once for all blocks of a model, because it launches kernels of its own. The result has no gradient.
    """
    rank, float32 = dt_proj.shape[-2], jnp.float32
    missing = -rank % RANK_MULTIPLE
    columns = jnp.swapaxes(x_proj, -1, -2)
    zeros = jnp.zeros((*columns.shape[:-2], missing, columns.shape[-1]), columns.dtype)
    project = jnp.concatenate([columns[..., :rank, :], zeros, columns[..., rank:, :]], axis=-2)
    step = jnp.swapaxes(dt_proj, -1, -2)
    step = jnp.pad(step, [(0, 0)] * (step.ndim - 1) + [(0, missing)])
    weights = ScanWeights(
        _tf32(project.astype(float32)),
        _tf32(step.astype(float32)),
        bias.astype(float32),
        A.astype(float32),
    )
    return jax.tree.map(lax.stop_gradient, weights)


def projected_scan(
    u: Float[Array, "2 b l e"],
    weights: ScanWeights,
    params: Any,
    *,
    step_by_step: Callable[[Any, jax.Array, Known | None], tuple[jax.Array, jax.Array]],
    y_dtype: Any = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "b l e"], Float[Array, "b l e"]]:
    """Project the tokens u to Δ, B and C, and scan them in both directions.

        [p, B, C] = u · project^T;   Δ = softplus(p · step^T + bias);   y = scan(u, Δ, A, B, C)

    On Hopper GPUs, and only there, one kernel computes this; `step_by_step` takes four or more. u, p and the products'
    weights are rounded to nearest in TF32; sums, Δ, B, C and the states are float32. Of bfloat16 tokens the weights are
    rounded to bfloat16, and p to two numbers of bfloat16, a more exact one than in TF32. The kernel takes 16 states and
    at most 64 steps. The number of channels must be a multiple of 128 and fit shared memory: at most 768 of float32
    tokens, and 1,536 of bfloat16.

    The gradient is that of `step_by_step`. In the forward pass of a gradient of 8 to 16 steps, the kernel also writes
    Δ, B, C and the columns of x_proj, and `step_by_step` is differentiated around them. For other lengths, for bfloat16
    tokens, and wherever the kernel does not run, `step_by_step` takes its place.

    Args:
        u: inputs of both directions, in stored order; the second direction visits the steps from last to first.
        weights: result of `scan_weights` for one block.
        params: pytree passed to `step_by_step`; gradients flow to it, not to `weights`.
        step_by_step: function (params, u, known) -> (y_f, y_b) that computes the same from the original parameters.
            It must put what `known` holds, if it is not None, in the place of its own results by `instead`; the number
            of its columns must be that of `weights` then. It must not close over tracers.
        y_dtype: dtype of the results, float32 or bfloat16; by default u's.
        implementation: "pallas" (the kernel), "xla" (`step_by_step`), or "auto": the kernel where it can run.

    Returns:
        y of the first and of the second direction.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.
        NotImplementedError: implementation is "pallas", but the kernel cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{NAME}: implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}"
        )
    u = as_floats(NAME, "u", u, "2 b l e")
    _check(u, weights)
    # If "auto" finds a reason against the kernel, no warning is logged, because `step_by_step` has kernels of its own.
    covered = implementation == "pallas" or projected_unsupported(u, weights) is None
    dtype = jnp.dtype(u.dtype if y_dtype is None else y_dtype)

    def rounded(params: Any, u: jax.Array, known: Known | None) -> tuple[jax.Array, jax.Array]:
        first, second = step_by_step(params, u, known)
        return first.astype(dtype), second.astype(dtype)

    if not (covered and gpu.choose(implementation, NAME, lambda: _unsupported(u, weights))):
        return rounded(params, u, None)
    with reverse_mode_only(NAME, "FASTVIM_KERNELS=off and fastvim_jax.jvp"):
        return _scan(rounded, dtype, implementation == "pallas", u, weights, params)


def _check(u: jax.Array, weights: ScanWeights) -> None:
    beside = f"u {u.shape} (2 b l e)"
    width, states, rank = u.shape[-1], weights.A.shape[-1], weights.step.shape[-1]
    for name, x, letters, shape in (
        ("u", u, "2 b l e", (2, *u.shape[1:])),
        ("weights.project", weights.project, "2 r+2n e", (2, rank + 2 * states, width)),
        ("weights.step", weights.step, "2 e r", (2, width, rank)),
        ("weights.bias", weights.bias, "2 e", (2, width)),
        ("weights.A", weights.A, "2 e n", (2, width, states)),
    ):
        expect_shape(NAME, name, x, letters, shape, beside)


def projected_unsupported(u: Any, weights: ScanWeights) -> str | None:
    """Return why `projected_scan` of such arrays (or shapes) does not run as one kernel here, or None if it does."""
    return gpu.kernels_missing() or _unsupported(u, weights)


def _unsupported(u: Any, weights: ScanWeights) -> str | None:
    missing = gpu.wgmma_missing()
    if missing is not None:
        return missing
    from pallas_kernels.selective_scan import mosaic_projected

    return mosaic_projected.unsupported(u, weights.step.shape[-1], weights.A.shape[-1])


KEPT_STEPS = range(8, 17)
"""Lengths of scans whose gradient needs no states of the forward pass, and of which the kernel writes what it needs."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(step_by_step, dtype, always: bool, u, weights: ScanWeights, params):
    """Run the kernel on each device's share of the batch if the program is lowered for CUDA, otherwise XLA."""
    from pallas_kernels.selective_scan import mosaic_projected

    kernel, other = (
        functools.partial(run, y_dtype=dtype) for run in (mosaic_projected.forward, xla)
    )
    return _on_shares(kernel, other, ("b l e", "b l e"), always, u, weights)


def _on_shares(kernel, other, results, always: bool, u, weights: ScanWeights):
    def on_share(_, u, weights):
        return kernel(u, weights) if always else on_cuda(kernel, other, u, weights)

    of_weights = ScanWeights("d c e", "d e r", "d e", "d e n")  # type: ignore[arg-type]
    run = per_shard(on_share, ("d b l e", of_weights), results, split="b", opaque=True)
    return run(u, weights)


def _forward(step_by_step, dtype, always, u, weights, params):
    if u.shape[2] not in KEPT_STEPS or u.dtype != jnp.float32:
        return jax.vjp(lambda params, u: step_by_step(params, u, None), params, u)
    from pallas_kernels.selective_scan import mosaic_projected

    results = ("b l e", "b l e", "d b l e", "d b l c", "k d b l n")
    *y, delta, columns, BC = _on_shares(
        mosaic_projected.forward_keeping, xla_keeping, results, always, u, weights
    )
    known = Known(delta, columns, BC)
    # Nobody reads the result, so that XLA removes what computes it.
    _, pull = jax.vjp(lambda params, u: step_by_step(params, u, known), params, u)
    return tuple(side.astype(dtype) for side in y), pull


def _backward(step_by_step, dtype, always, pull, y_bar):
    params_bar, u_bar = pull(y_bar)
    return u_bar, None, params_bar


_scan.defvjp(_forward, _backward)


def xla(u: jax.Array, weights: ScanWeights, y_dtype: Any = None) -> tuple[jax.Array, jax.Array]:
    """Define what the kernel computes, rounding included, on any platform; by default y has the dtype of u."""
    first, second, *_ = xla_keeping(u, weights)
    dtype = u.dtype if y_dtype is None else y_dtype
    return first.astype(dtype), second.astype(dtype)


def xla_keeping(u: jax.Array, weights: ScanWeights) -> tuple[jax.Array, ...]:
    """Return the results of `xla`, and the arrays of `Known`."""
    narrow = u.dtype == jnp.bfloat16
    if narrow:
        project, step = (_bfloat16(w.astype(jnp.float32)) for w in weights[:2])
        weights, u = weights._replace(project=project, step=step), u.astype(jnp.float32)
    rank, states = weights.step.shape[-1], weights.A.shape[-1]
    multiply = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    projected = multiply("dble,dce->dblc", _tf32(u), weights.project)
    p = projected[..., :rank]
    p = _bfloat16(p) + _bfloat16(p - _bfloat16(p)) if narrow else _tf32(p)
    delta = multiply("dblr,der->dble", p, weights.step)
    B, C = jnp.split(projected[..., rank:], [states], axis=-1)
    y = bidirectional_scan(u, delta, weights.A, B, C, delta_bias=weights.bias, implementation="xla")
    return *y, delta, projected, jnp.stack([B, C])


def _tf32(x: jax.Array) -> jax.Array:
    """Round to the 10 bits of mantissa that TF32 products read."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def _bfloat16(x: jax.Array) -> jax.Array:
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

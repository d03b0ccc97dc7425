"""The gradient of `known_scan` by Mosaic GPU kernels for Hopper."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu
from pallas_kernels.selective_scan import mosaic_bidirectional
from pallas_kernels.selective_scan.mosaic_projected_cut import STATES
from pallas_kernels.selective_scan.mosaic_projection_gradients import (
    choose_cut,
    projection_gradients,
)
from pallas_kernels.selective_scan.mosaic_projection_weights import weight_gradients
from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions

RANKS = (16, 32)  # for which the kernels were compiled without spilled registers


def unsupported(u: Any, columns: int) -> str | None:
    """Return why the kernels cannot take tokens u `2 b l e` with so many columns of x_proj, or None."""
    if u.dtype != jnp.float32:
        return f"u is {u.dtype}, not float32"
    _, batch, length, width = u.shape
    rank = columns - 2 * STATES
    if rank not in RANKS:
        return f"a rank of {rank} is none of {RANKS}"
    if choose_cut(batch * length, width, rank, 1) is None:
        return f"{batch} x {length} tokens of {width} channels do not cut into tiles"
    return None


def gradients(u, x_proj, dt_proj, A, bias, known, y_bar) -> tuple[jax.Array, ...]:
    """See `known_scan`."""
    _, batch, length, width = u.shape
    tokens, all_columns = batch * length, known.columns.shape[-1]
    rank = all_columns - 2 * STATES
    B, C = known.BC[..., None, :]
    inputs = ScanInputs(u=u, delta=known.delta, A=A, B=B, C=C, D=None, z=None, delta_bias=bias)
    options = ScanOptions(
        delta_softplus=True,
        reverse=False,
        return_last_state=False,
        chunk=mosaic_bidirectional.chunk_length(inputs),
    )
    cut = choose_cut(tokens, width, rank, 1)
    if cut is None:
        bars = mosaic_bidirectional.backward(inputs, options, None, y_bar, None)
        return *_products(u, x_proj, dt_proj, known.columns, bars), bars.A, bars.delta_bias
    u_bar, delta_bar, A_bar, bias_bar, bc = mosaic_bidirectional.short_gradients(
        inputs, options, y_bar
    )
    flat = lambda x: x.reshape(2, tokens, x.shape[-1])  # noqa: E731
    cut = dataclasses.replace(cut, shares=bc.shape[0])
    interpret = gpu.interpreted()
    u_bar, columns_bar = gpu.run_once(projection_gradients(
        flat(delta_bar), bc.reshape(bc.shape[0], -1, 2, STATES), flat(u_bar), dt_proj, x_proj, cut,
        interpret=interpret,
    ))  # fmt: skip
    project, step = gpu.run_once(weight_gradients(
        flat(u), columns_bar, flat(delta_bar), flat(known.columns), rank=rank, interpret=interpret
    ))  # fmt: skip
    step_bar = _with_rows_of(step.sum(0), dt_proj)
    return u_bar.reshape(u.shape), project.sum(0), step_bar, A_bar, bias_bar


def _products(u, x_proj, dt_proj, columns, bars: ScanInputs) -> tuple[jax.Array, ...]:
    """Return the gradients of tokens and of both projections, given the scans', by XLA's products."""
    rank = columns.shape[-1] - 2 * STATES
    of_rank = jnp.einsum("dble,dre->dblr", bars.delta, dt_proj[:, :rank])
    columns_bar = jnp.concatenate([of_rank, bars.B[..., 0, :], bars.C[..., 0, :]], axis=-1)
    u_bar = bars.u + jnp.einsum("dblc,dec->dble", columns_bar, x_proj)
    step_bar = jnp.einsum("dblr,dble->dre", columns[..., :rank], bars.delta)
    x_bar = jnp.einsum("dble,dblc->dec", u, columns_bar)
    return u_bar, x_bar, _with_rows_of(step_bar, dt_proj)


def _with_rows_of(step_bar: jax.Array, dt_proj: jax.Array) -> jax.Array:
    """Fill up with zeros for the rows of `dt_proj` that nothing reads."""
    return jnp.pad(step_bar, [(0, 0), (0, dt_proj.shape[1] - step_bar.shape[1]), (0, 0)])

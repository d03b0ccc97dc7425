"""Define `known_scan`: scans and projections whose results are known, for the sake of their gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.selective_scan.bidirectional import bidirectional_scan
from pallas_kernels.selective_scan.projected import Known, instead
from pallas_kernels.sharding import mark_varying, match_types, on_cuda, per_shard


def known_scan_unsupported(u: Any, columns: int) -> str | None:
    """Return why the gradient of `known_scan` does not run in kernels for tokens u `2 b l e` here, or None."""
    from pallas_kernels.selective_scan import mosaic_known

    return gpu.wgmma_missing() or mosaic_known.unsupported(u, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def known_scan(
    always: bool,
    u: Float[Array, "2 b l e"],
    x_proj: Float[Array, "2 e c"],
    dt_proj: Float[Array, "2 r e"],
    A: Float[Array, "2 e n"],
    bias: Float[Array, "2 e"],
    known: Known,
) -> tuple[Float[Array, "b l e"], Float[Array, "b l e"]]:
    """Return zeros in the place of both scans' results, which the caller has already. Only the gradient counts.

    It is that of

        [p, B, C] = u x_proj;   Δ = softplus(p dt_proj + bias);   y = scan(u, Δ, A, B, C)

    with all that `known` holds in its place. On Hopper GPUs three kernels compute it: the scans' gradients, those of
    the tokens through the projections, and those of the projections' weights. The operands of products are rounded to
    bfloat16 for the latter, and are in TF32 for the former, as are the scans' gradients of B and C where tensor cores
    add them up over channels. Call `known_scan_unsupported` first. A device's share of a sharded batch may still not
    cut into tiles; then XLA computes the products, and the sums are float32.

    Args:
        always: run the kernels on any platform (in the interpreter), not only if the program is lowered for CUDA.
        u: tokens, float32.
        x_proj, dt_proj: projections, float32. Rows of `dt_proj` behind the columns of Δ are ignored.
        A, bias: see `bidirectional_scan`.
        known: results of the projections.
    """
    del always
    nothing = mark_varying(jnp.zeros_like(u[0]), (u, x_proj, dt_proj, A, bias, known))
    return nothing, nothing


def _forward(always, *arrays):
    return known_scan(always, *arrays), arrays


def _backward(always, arrays, y_bar):
    from pallas_kernels.selective_scan import mosaic_known

    def on_share(_, *arrays):
        run = mosaic_known.gradients
        return run(*arrays) if always else on_cuda(run, _xla, *arrays)

    tokens, weights = "d b l e", ("d e c", "d r e", "d e n", "d e")
    known: Any = Known(tokens, "d b l c", "k d b l n")  # type: ignore[arg-type]
    operands = (tokens, *weights, known, ("b l e", "b l e"))
    run = per_shard(on_share, operands, (tokens, *weights), split="b", opaque=True)
    # Inside a caller's shard_map, the weights' gradients are still to be summed over the devices.
    return *match_types(run(*arrays, y_bar), arrays[:-1]), None


known_scan.defvjp(_forward, _backward)


def _xla(u, x_proj, dt_proj, A, bias, known: Known, y_bar):
    """Define the gradient on any platform."""

    def scans(u, x_proj, dt_proj, A, bias):
        columns = instead(jnp.einsum("dble,dec->dblc", u, x_proj), known.columns)
        rank = columns.shape[-1] - 2 * A.shape[-1]
        delta = jnp.einsum("dblr,dre->dble", columns[..., :rank], dt_proj[:, :rank])
        B, C = jnp.split(columns[..., rank:], 2, axis=-1)
        return bidirectional_scan(
            u, instead(delta, known.delta), A, B, C, delta_bias=bias, implementation="xla"
        )

    _, pull = jax.vjp(scans, u, x_proj, dt_proj, A, bias)
    return pull(y_bar)

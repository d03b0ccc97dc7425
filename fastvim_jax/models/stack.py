"""Run a stack of equal blocks whose parameters are stored with a leading `depth` axis.

Poolings repeat with a period, for instance rows, columns, rows, columns. Mode "scan" compiles one period and runs
`lax.scan` over the periods, or `indexed_scan` if kernels join the blocks; mode "unroll" compiles every block. Both
modes read the same stacked parameters, so names, masks and checkpoints are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.distributed.sharding import gather
from fastvim_jax.layers.channel_pooling import ChannelPooling
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from fastvim_jax.models.indexed_scan import indexed_scan
from fastvim_jax.models.parts import run_in_parts
from pallas_kernels.sharding import varying_axes

Block = TypeVar("Block", bound=nnx.Module)

REMAT_POLICIES: dict[str, Any] = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack_blocks(make: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Build `depth` independently initialised blocks as one module whose parameters have a leading axis."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), depth)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys))


def run_blocks(
    blocks: nnx.Module,
    residual: Any,
    poolings: Sequence[Pooling],
    *,
    depth: int,
    keep: jax.Array | None,
    mode: str,
    remat: str,
    output_blocks: Sequence[int] = (),
) -> tuple[Any, dict[int, tuple[Any, Any]]]:
    """Run the blocks over the residual stream.

    Args:
        blocks: Module from `stack_blocks`; called as `block(residual, pooling, keep)`, returning the new residual
            and the block's output.
        residual: `b l d`; or any pytree that the blocks take and return in its place.
        poolings: One period of poolings: block i uses `poolings[i % len(poolings)]`.
        depth: Number of blocks.
        keep: Drop-path factors with leading axis `depth`, or None.
        mode: "scan" or "unroll".
        remat: What the backward pass recomputes: "none", "block" (a whole block) or "dots" (all but matrix products).
        output_blocks: Indices of the blocks to return values of.

    Returns:
        The last residual; and for each of `output_blocks`, by index, the residual before the block and its output.
    """
    graphdef, stacked = nnx.split(blocks)
    period = len(poolings)

    def apply(index_in_period: int, params, keep_i, residual):
        # Gather the sharded parameters of this block only. The checkpoint makes the backward pass gather them again
        # instead of keeping them.
        return nnx.merge(graphdef, gather(params))(residual, poolings[index_in_period], keep_i)

    if remat != "none":
        apply = jax.checkpoint(apply, policy=REMAT_POLICIES[remat], static_argnums=(0,))

    # Joined blocks, whose kernels have a reverse-mode gradient only; poolings without arrays.
    indexed = not isinstance(residual, jax.Array) and all(
        isinstance(p, GridPooling | ChannelPooling | NoPooling) for p in poolings
    )
    by_block = _unstack((stacked, keep)) if mode == "unroll" else None

    def one(i: int, residual):
        params, keep_i = (
            jax.tree.map(lambda x: x[i], (stacked, keep)) if by_block is None else by_block[i]
        )
        return apply(i % period, params, keep_i, residual)

    def segment(start: int, stop: int, residual):
        periods = (stop - start) // period if mode == "scan" else 0
        end = start + periods * period
        if periods > 1 and indexed:
            params, keeps = jax.tree.map(lambda leaf: leaf[start:end], (stacked, keep))
            step = lambda j, *args: apply((start + j) % period, *args)[0]  # noqa: E731
            residual = indexed_scan(step, params, keeps, residual, period)
            start = end
        elif periods > 1:

            def one_period(xs, residual):
                for j in range(period):
                    params, keep_i = jax.tree.map(lambda leaf: leaf[j], xs)  # noqa: B023
                    residual, _ = apply((start + j) % period, params, keep_i, residual)
                return residual

            def body(residual, xs):
                if keep is not None or not isinstance(residual, jax.Array):
                    return one_period(xs, residual), None
                return run_in_parts(one_period, xs, residual, poolings), None

            xs = jax.tree.map(
                lambda leaf: leaf[start:end].reshape(periods, period, *leaf.shape[1:]),
                (stacked, keep),
            )
            residual, _ = jax.lax.scan(body, residual, xs)
            start = end
        for i in range(start, stop):
            residual, _ = one(i, residual)
        return residual

    outputs = {}
    start = 0
    for index in sorted(set(output_blocks)):
        before = segment(start, index, residual)
        residual, hidden = one(index, before)
        outputs[index] = (before, hidden)
        start = index + 1
    return segment(start, depth, residual), outputs


def _unstack(tree: Any) -> list[Any]:
    """Split stacked leaves into one tree per block.

    The gradient of `jnp.unstack` is one concatenation. The gradient of `depth` slices would be a sum of `depth` padded
    arrays, which XLA adds up element by element inside the optimizer's update.
    """
    leaves, structure = jax.tree.flatten(tree)
    blocks = zip(*map(jnp.unstack, leaves), strict=True)
    alone = (map(_with_own_gradient, block) for block in blocks)
    return [jax.tree.unflatten(structure, block) for block in alone]


_LARGE = 2**17
"""Entries of an array from which on its gradient is written alone."""


def _with_own_gradient(leaf: jax.Array) -> jax.Array:
    """Return `leaf`. If it is large and differs between devices, its gradient is written before it is joined.

    Otherwise XLA transposes products where it joins the gradients of all blocks, number by number: for in_proj of
    FastVim-S 0.39 ms of a step. On one device it joins and updates at once, and transposes them well.
    """
    return _own_gradient(leaf) if leaf.size >= _LARGE and varying_axes(leaf) else leaf


@jax.custom_jvp
def _own_gradient(leaf: jax.Array) -> jax.Array:
    return leaf


@_own_gradient.defjvp
def _own_gradient_jvp(primals: Any, tangents: Any) -> Any:
    flat = jax.lax.optimization_barrier(tangents[0].reshape(-1))
    return primals[0], flat.reshape(tangents[0].shape)

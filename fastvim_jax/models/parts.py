"""Run blocks on a few images at a time on a CPU, so that their arrays stay in the cores' caches.

A block makes a dozen passes over arrays of the size of the tokens. For 16 images of 224 px and FastVim-T the widest has
10 MB, and a core's second-level cache 1 to 2 MB. docs/performance.md says what the parts gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fastvim_jax.layers.channel_pooling import ChannelPooling
from fastvim_jax.layers.cores import program_cores
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from fastvim_jax.typing import Tokens

CACHE = 2 << 20
"""Bytes of a block's widest array, per core."""


def run_in_parts(
    run: Callable[[Any, Tokens], Tokens], params: Any, tokens: Tokens, poolings: Sequence[Pooling]
) -> Tokens:
    """Compute `run(params, tokens)`. On a CPU and without gradients, run some images after the others.

    With gradients a loop over parts takes longer than the whole batch at once, because it copies what the backward pass
    reads.

    Args:
        run: computes each image apart from the others. It may close over no traced array.
        params: first argument of `run`, any pytree.
        tokens: second argument of `run`, `b l d`.
        poolings: the poolings that `run` uses. Those of a masked model hold indices for the whole batch.
    """
    if not all(isinstance(p, GridPooling | ChannelPooling | NoPooling) for p in poolings):
        return run(params, tokens)
    # A program that is exported for any batch has a symbolic size, which no number divides.
    size = images_at_once(tokens) if isinstance(tokens.shape[0], int) else tokens.shape[0]
    if size == tokens.shape[0]:
        return run(params, tokens)

    def part_by_part(params: Any, tokens: Tokens) -> Tokens:
        parts = tokens.reshape(-1, size, *tokens.shape[1:])
        # The barrier keeps XLA from slicing the blocks' parameters out of their stack again for every part.
        params = jax.lax.optimization_barrier(params)
        return jax.lax.map(lambda part: run(params, part), parts).reshape(tokens.shape)

    @jax.custom_jvp
    def without_gradients(params: Any, tokens: Tokens) -> Tokens:
        return jax.lax.platform_dependent(params, tokens, cpu=part_by_part, default=run)

    without_gradients.defjvp(lambda primals, tangents: jax.jvp(run, primals, tangents))
    return without_gradients(params, tokens)


def images_at_once(tokens: Tokens) -> int:
    """Return how many images' arrays the caches hold together: a divisor of the batch of `tokens` `b l d`.

    It is the whole batch where the program is for other devices than this machine's single CPU device: several devices
    share out the batch, and a loop over parts would gather it.
    """
    batch = tokens.shape[0]
    sharded = any(axis is not None for axis in jax.typeof(tokens).sharding.spec)
    if sharded or batch == 0 or not (cores := program_cores()):
        return batch
    # The output of in_proj, and the hidden layer of a ViT's MLP, are four times as wide as the tokens.
    image = 4 * tokens[0].size * tokens.dtype.itemsize
    limit = max(1, cores * CACHE // max(1, image))
    return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= limit)

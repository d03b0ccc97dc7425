"""Kernels that write one half of an array whose other half is there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config
from jax.experimental import pallas as pl


def in_place(run: Callable[..., jax.Array], shares: jax.ShapeDtypeStruct) -> Callable[..., Any]:
    """Wrap a kernel ``run(array's reference, *others) → shares`` as ``(array, *others) → (array, shares)``.

    The array stays in its buffer where nothing else needs that. Under `jax.vmap` examples run one after the other.
    """

    @jax.custom_batching.custom_vmap
    def call(array, *others):
        def write(refs):
            array_ref, shares_ref = refs
            shares_ref[...] = run(array_ref, *others)

        # Pallas takes no reference whose type says over which devices it varies. Results of reshapes don't say it here,
        # as those of `plgpu.kernel` don't; the caller adds it again (`sharding.mark_varying`).
        with config._check_vma(False):
            array = array.reshape(-1).reshape(array.shape)
            # XLA fuses slices and updates of stacks into the calls that read and write them, also where that separates
            # the array from the place it is to be written to; the barriers keep this call's own buffer.
            arrays = (lax.optimization_barrier(array), jnp.zeros(shares.shape, shares.dtype))
            return lax.optimization_barrier(pl.run_state(write)(arrays))

    @call.def_vmap  # run_state has no rule for it
    def one_by_one(axis_size, batched, *arrays):
        repeat = lambda x: jnp.broadcast_to(x, (axis_size, *x.shape))  # noqa: E731
        stacked = [x if has else repeat(x) for x, has in zip(arrays, batched, strict=True)]
        return lax.map(lambda arrays: call(*arrays), stacked), (True, True)

    return call

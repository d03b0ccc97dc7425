"""Wrap kernels that write one half of an array whose other half is written already."""

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

    The array stays in its buffer if nothing else needs its old values. Under `jax.vmap` examples run one by one.
    """

    @jax.custom_batching.custom_vmap
    def call(array, *others):
        def write(refs):
            array_ref, shares_ref = refs
            shares_ref[...] = run(array_ref, *others)

        # Pallas refuses references whose type says over which mesh axes they vary. Without the check, neither reshapes
        # nor `plgpu.kernel` record that, and the caller adds it again (`sharding.mark_varying`).
        with config._check_vma(False):
            array = array.reshape(-1).reshape(array.shape)
            # The barriers give this call a buffer of its own. Otherwise XLA fuses slices and updates of stacks into it,
            # even if the array then no longer lies where the kernel is to write.
            arrays = (lax.optimization_barrier(array), jnp.zeros(shares.shape, shares.dtype))
            return lax.optimization_barrier(pl.run_state(write)(arrays))

    @call.def_vmap  # run_state has no rule for it
    def one_by_one(axis_size, batched, *arrays):
        repeat = lambda x: jnp.broadcast_to(x, (axis_size, *x.shape))  # noqa: E731
        stacked = [x if has else repeat(x) for x, has in zip(arrays, batched, strict=True)]
        return lax.map(lambda arrays: call(*arrays), stacked), (True, True)

    return call

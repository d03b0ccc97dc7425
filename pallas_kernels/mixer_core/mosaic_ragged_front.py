"""Compute convolutions, SiLU, row sums and skips of a ragged grid as one Mosaic GPU kernel.

The tokens may be visited in another order than the one in which they are stored, so a thread reads every token straight
from its place in global memory, the next segment's tokens ahead of this one's work. If there are few samples, each is
cut into runs of tokens, and every run has sums of its own. `mosaic_ragged_staged` takes samples that fit shared memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.mosaic_common import CHANNELS, Convolutions, row_layout
from pallas_kernels.mixer_core.mosaic_ragged_common import Runs, pack, take_turn
from pallas_kernels.mosaic import gpu_kernel, interpret_params, store


@functools.partial(jax.jit, static_argnames=("runs", "rows", "share", "interpret"))
def front(x, ids, places, kernels, biases, D, runs: Runs, *, rows: int, share: float, interpret):
    """Compute the row sums of both directions and the mean of their skips.

    Args:
        x: ``b l ≥e``; channels beyond e are not read.
        ids: row of each visited token for the forward and the backward direction, ``b l`` int32, never decreasing.
        places: index in x of each visited token, ``b l`` int32, or None: tokens are visited as they are stored.
        kernels: ``2 k e``, biases and D ``2 e``, float32, forward then backward.
        runs: how the tokens are cut.
        rows: rows of the ragged grid, at most `MOST_ROWS`.
        share: factor of the sums.
        interpret: run in Pallas' interpreter.

    Returns:
        Row sums ``2 b rows e`` float32, zero for rows without tokens; and the skips, ``b l e`` in x's dtype and order.
    """
    (batch, length, _), width, halo = x.shape, kernels.shape[2], kernels.shape[1] - 1
    groups = length // runs.tokens
    layout = row_layout(runs.channels, owned=runs.channels // CHANNELS)

    def body(x_ref, steps_ref, *refs):
        *places_refs, kernels_ref, biases_ref, D_ref, u_ref, skip_ref = refs
        sample, group = lax.axis_index("batch"), lax.axis_index("group")
        channels = pl.ds(lax.axis_index("block") * runs.channels, runs.channels)
        first = group * runs.tokens

        def place(token):
            return places_refs[0][sample, token] if places_refs else token

        def fetch(token):
            """Load a token, or zeros outside of the sample."""
            inside = jnp.logical_and(token >= 0, token < length)
            here = jnp.minimum(jnp.maximum(token, 0), length - 1)
            value = plgpu.load(
                x_ref.at[sample, place(here), channels], layout=layout, optimized=False
            )
            return jnp.where(inside, value, jnp.zeros((), x.dtype))

        window = tuple(fetch(first + t).astype(jnp.float32) for t in range(-halo, halo))
        ahead = tuple(fetch(first + halo + t) for t in range(runs.segment))
        convolutions = Convolutions(
            kernels_ref, biases_ref, D_ref, channels, x.dtype, interpret, layout=layout
        )
        zero = plgpu.layout_cast(jnp.zeros((runs.channels,), jnp.float32), layout)

        def write_row(d, row, total):
            store(u_ref.at[d, sample, group, row, channels], total * share)

        def clear(row, _):
            for d in (0, 1):
                write_row(d, row, zero)
            return ()

        lax.fori_loop(0, rows, clear, ())

        def turn(number, carry):
            window, now, sums = map(list, carry)
            start = first + number * runs.segment
            at = [jnp.minimum(start + t, length - 1) for t in range(runs.segment)]
            steps = [steps_ref[sample, token] for token in at]
            stored = [place(token) for token in at]
            ahead = tuple(fetch(start + runs.segment + halo + t) for t in range(runs.segment))

            def write_skip(t, skip):
                store(skip_ref.at[sample, stored[t], channels], skip)

            take_turn(
                number * runs.segment, now, window, sums, runs, convolutions,
                steps.__getitem__, write_skip, write_row,
            )  # fmt: skip
            return tuple(window), ahead, tuple(sums)

        lax.fori_loop(0, runs.segments, turn, (window, ahead, (zero, zero)))

    u, skips = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((2, batch, groups, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, length, width), x.dtype),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_ragged_front",
        grid=(width // runs.channels, groups, batch),
        grid_names=("block", "group", "batch"),
    )(x, pack(ids, runs), *(() if places is None else (places,)), kernels, biases, D)
    return u.sum(2) if groups > 1 else u[:, :, 0], skips

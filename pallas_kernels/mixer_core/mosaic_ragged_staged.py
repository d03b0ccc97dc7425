"""Compute what `mosaic_ragged_front` does for samples whose tokens fit shared memory, as one Mosaic GPU kernel.

The copy engine brings all tokens of a sample to shared memory at once, in stored order, with their rows and places.
Threads walk them there, so that no token waits for global memory. Rows without tokens are the only ones cleared.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.mosaic_common import CHANNELS, Convolutions, row_layout
from pallas_kernels.mixer_core.mosaic_ragged_common import ENDS, Runs, pack, take_turn
from pallas_kernels.mosaic import SHARED_MEMORY, gpu_kernel, interpret_params, store

RESIDENT = 4  # thread blocks that the registers of a processor hold
_BOX = 256  # most numbers along an axis of one bulk copy


def fits(length: int, rows: int, runs: Runs, itemsize: int) -> bool:
    """Return whether runs are whole samples, of which shared memory holds as many as a processor has thread blocks."""
    words = _whole(length + rows) + _whole(length)
    needed = (
        length * runs.channels * itemsize + 4 * words + 1024
    )  # 1 KiB of each block is the GPU's
    return runs.tokens == length and RESIDENT * needed <= SHARED_MEMORY


def _whole(words: int) -> int:
    """Return the number of 32-bit words in whole 128 bytes, as the copy engine wants them."""
    return words + -words % 32


@functools.partial(jax.jit, static_argnames=("runs", "rows", "share", "interpret"))
def front(x, ids, places, kernels, biases, D, runs: Runs, *, rows: int, share: float, interpret):
    """See `mosaic_ragged_front.front`. Only runs that `fits` names will do."""
    (batch, length, _), width, halo = x.shape, kernels.shape[2], kernels.shape[1] - 1
    layout = row_layout(runs.channels, owned=runs.channels // CHANNELS)
    words = _words(ids, rows, runs), *(() if places is None else (_padded(places),))

    def body(x_ref, *refs):
        words_refs, refs = refs[: len(words)], refs[len(words) :]
        kernels_ref, biases_ref, D_ref, u_ref, skip_ref, tokens, steps, *stored, barrier = refs
        sample = lax.axis_index("batch")
        channels = pl.ds(lax.axis_index("block") * runs.channels, runs.channels)
        for source, held in zip(words_refs, (steps, *stored), strict=True):
            for part in _parts(held.shape[0]):
                plgpu.copy_gmem_to_smem(source.at[sample, part], held.at[part], barrier)
        for part in _parts(length):
            source = x_ref.at[sample, part, channels]
            plgpu.copy_gmem_to_smem(source, tokens.at[part], barrier)
        convolutions = Convolutions(
            kernels_ref, biases_ref, D_ref, channels, x.dtype, interpret, layout=layout
        )
        zero = plgpu.layout_cast(jnp.zeros((runs.channels,), jnp.float32), layout)
        plgpu.barrier_wait(barrier)

        def place(token):
            return stored[0][token] if stored else token

        def fetch(token):
            """Load a token, or zeros behind the last one."""
            here = place(jnp.minimum(token, length - 1))
            value = plgpu.load(tokens.at[here], layout=layout, optimized=False)
            return jnp.where(token < length, value, jnp.zeros((), x.dtype))

        def write_row(d, row, total):
            store(u_ref.at[d, sample, row, channels], total * share)

        def clear(row, _):
            for d in (0, 1):
                pl.when((steps[length + row] & ENDS[d]) == 0)(
                    functools.partial(write_row, d, row, zero)
                )
            return ()

        lax.fori_loop(0, rows, clear, ())

        def turn(number, carry):
            window, sums = map(list, carry)
            start = number * runs.segment
            entering = [fetch(start + halo + t) for t in range(runs.segment)]

            def at(t):
                return start + t if runs.whole else jnp.minimum(start + t, length - 1)

            def write_skip(t, skip):
                store(skip_ref.at[sample, place(at(t)), channels], skip)

            take_turn(
                start, entering, window, sums, runs, convolutions,
                lambda t: steps[at(t)], write_skip, write_row,
            )  # fmt: skip
            return tuple(window), tuple(sums)

        first = [fetch(jnp.int32(t)).astype(jnp.float32) for t in range(halo)]
        lax.fori_loop(0, runs.segments, turn, ((zero,) * halo + tuple(first), (zero, zero)))

    copies = len(_parts(length)) + sum(len(_parts(x.shape[1])) for x in words)
    u, skips = gpu_kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((2, batch, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, length, width), x.dtype),
        ],
        scratch_types=[
            plgpu.SMEM((length, runs.channels), x.dtype),
            *(plgpu.SMEM((x.shape[1],), jnp.int32) for x in words),
            plgpu.Barrier(num_arrivals=copies),
        ],
        interpret=interpret_params(interpret),
        kernel_name="mixer_ragged_front",
        grid=(width // runs.channels, batch),
        grid_names=("block", "batch"),
    )(x, *words, kernels, biases, D)
    return u, skips


def _parts(size: int) -> list:
    """Cut an axis into the slices of bulk copies."""
    return [pl.ds(at, min(_BOX, size - at)) for at in range(0, size, _BOX)]


def _words(ids, rows: int, runs: Runs) -> jax.Array:
    """Pack the tokens' rows. Behind them follow the rows, each with the flags of the directions where it has tokens."""
    of_rows = jnp.zeros((ids[0].shape[0], rows), jnp.int32)
    for d, of_row in enumerate(ids):
        there = jnp.any(of_row[:, None, :] == jnp.arange(rows)[:, None], axis=2)
        of_rows = of_rows | jnp.where(there, jnp.int32(ENDS[d]), 0)
    return _padded(jnp.concatenate([pack(ids, runs), of_rows], axis=1))


def _padded(words: jax.Array) -> jax.Array:
    return jnp.pad(words, ((0, 0), (0, _whole(words.shape[1]) - words.shape[1])))

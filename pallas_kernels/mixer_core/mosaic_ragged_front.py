"""Compute convolutions, SiLU, row sums and skips of a ragged grid as one Mosaic GPU kernel.

A thread owns one or two channels and walks the tokens in the order in which the mixer visits them. This may be another
order than the one in which they are stored, so a thread reads every token straight from its place in global memory, the
next segment's tokens ahead of this one's work. When the next token is in another row, the thread writes the sum of the
row that ends. The directions have rows of their own. If there are few samples, each is cut into runs of tokens, and
every run has sums of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mixer_core.grid import lines_per_block
from pallas_kernels.mixer_core.mosaic_common import CHANNELS, Convolutions, row_layout
from pallas_kernels.mosaic import gpu_kernel, interpret_params, store

_BITS = 15  # of a row's number: both directions' rows fit one integer beside their flags
MOST_ROWS = 1 << _BITS
_ENDS = (1 << 30, -(1 << 31))  # flags of `_steps`, forward and backward


@dataclasses.dataclass(frozen=True)
class Runs:
    """Say how the tokens of a sample are cut among thread blocks and turns of a loop.

    Attributes:
        tokens: tokens of a thread block. They divide those of a sample.
        segment: tokens of a turn.
        channels: of a thread block; a thread owns one or two.
    """

    tokens: int
    segment: int
    channels: int

    @property
    def segments(self) -> int:
        """Turns of a thread block."""
        return math.ceil(self.tokens / self.segment)

    @property
    def whole(self) -> bool:
        """Whether the last turn is a whole one."""
        return self.tokens % self.segment == 0


def cut(batch: int, length: int, width: int, enough: int) -> Runs:
    """Choose runs that make `enough` thread blocks, and segments of 4 to 8 tokens of which few are past a run's end."""
    channels = 2 * CHANNELS if width % (2 * CHANNELS) == 0 else CHANNELS
    tokens = lines_per_block(length, batch * width // channels, enough)
    segment = min(range(4, 9), key=lambda n: (math.ceil(tokens / n) * n, -n))
    return Runs(tokens, min(segment, tokens), channels)


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

        def wide(value):
            return value.astype(jnp.float32)

        window = tuple(wide(fetch(first + t)) for t in range(-halo, halo))
        ahead = tuple(fetch(first + halo + t) for t in range(runs.segment))
        convolutions = Convolutions(
            kernels_ref, biases_ref, D_ref, channels, x.dtype, interpret, layout=layout
        )
        zero = plgpu.layout_cast(jnp.zeros((runs.channels,), jnp.float32), layout)

        def clear(row, _):
            for d in (0, 1):
                store(u_ref.at[d, sample, group, row, channels], zero)
            return ()

        lax.fori_loop(0, rows, clear, ())

        def turn(number, carry):
            window, now, sums = map(list, carry)
            start = first + number * runs.segment
            at = [jnp.minimum(start + t, length - 1) for t in range(runs.segment)]
            steps = [steps_ref[sample, token] for token in at]
            stored = [place(token) for token in at]
            ahead = tuple(fetch(start + runs.segment + halo + t) for t in range(runs.segment))

            for t in range(runs.segment):
                window.append(wide(now[t]))
                both = convolutions.of(window)
                skip = convolutions.skip(both)
                write = lambda t=t, skip=skip: store(  # noqa: E731
                    skip_ref.at[sample, stored[t], channels], skip
                )
                exists = None if runs.whole else number * runs.segment + t < runs.tokens
                if exists is None:
                    write()
                else:
                    pl.when(exists)(write)
                for d, c in enumerate(both):
                    ends = (steps[t] & _ENDS[d]) != 0
                    if exists is not None:
                        ends = jnp.logical_and(ends, exists)
                    row = (steps[t] >> (_BITS * d)) & (MOST_ROWS - 1)
                    sums[d] = sums[d] + c

                    @pl.when(ends)
                    def _(row=row, d=d, total=sums[d] * share):
                        store(u_ref.at[d, sample, group, row, channels], total)

                    sums[d] = jnp.where(ends, 0.0, sums[d])
                window.pop(0)
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
    )(x, _steps(ids, runs), *(() if places is None else (places,)), kernels, biases, D)
    return u.sum(2) if groups > 1 else u[:, :, 0], skips


def _steps(ids, runs: Runs) -> jax.Array:
    """Pack each token's rows of both directions, and whether the token is the last of its row in its run."""
    last = (jnp.arange(ids[0].shape[1]) + 1) % runs.tokens == 0
    packed = jnp.zeros_like(ids[0])
    for d, of_row in enumerate(ids):
        following = jnp.concatenate([of_row[:, 1:], of_row[:, -1:]], axis=1)
        ends = jnp.logical_or(of_row != following, last)
        packed = packed | (of_row << (_BITS * d)) | jnp.where(ends, jnp.int32(_ENDS[d]), 0)
    return packed
